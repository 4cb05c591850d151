"""Blind preference tests: a study from bench's pictures, a server, a page without a server, and the analysis of the votes."""
