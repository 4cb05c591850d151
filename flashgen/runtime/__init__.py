"""The machine: processes, memory, time."""
