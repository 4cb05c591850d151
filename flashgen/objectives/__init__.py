"""Losses: predictions in, losses out."""
