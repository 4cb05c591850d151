"""Versioned artifact directories: manifest, opening, drafts."""
