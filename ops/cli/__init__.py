"""The ``ratchet`` command."""

import gc

gc.set_threshold(50_000)
"""Imports make many objects that stay. With Python's threshold (700) a quarter of a command's start was spent on visiting
them again and again."""
