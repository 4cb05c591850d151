"""Training loops, roles and cached data."""
