"""Drawing with exported artifacts; imports no torch."""
