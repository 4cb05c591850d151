"""Judges: whatever gives numbers for pictures."""
