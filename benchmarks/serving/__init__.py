"""Measurements of a whole server with its stores, each of which may fail."""
