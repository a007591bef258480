"""Imports make millions of objects that stay, and looking for garbage among them again and again took a fifth of the
tests' time."""

import gc

gc.set_threshold(50_000, 20, 20)
