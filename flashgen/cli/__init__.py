"""The command line: parses, calls a stage, prints its result."""
