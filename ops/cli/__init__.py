"""The command line. The only package of ``ops`` that knows the other parts; commands import them when needed."""

import gc

gc.set_threshold(50_000)
"""Imports make many objects that stay. With Python's threshold of 700 a quarter of a command's start went into
visiting them again and again."""
