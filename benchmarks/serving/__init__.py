"""Measurements of a whole server with its stores beside it, each of which may fail."""
