"""Weights as codes of 2 to 8 bits: tensors in, tensors out."""
