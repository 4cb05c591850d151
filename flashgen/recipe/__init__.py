"""Recipe sections and their loader."""
