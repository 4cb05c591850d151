"""The stages and their runner."""
