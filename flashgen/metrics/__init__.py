"""Latency, distances and reports."""
