"""Memory that was freed, back to the system."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def return_free_memory() -> None:
    """Give the system the pages that hold nothing any more, in the middle of the heap, too (glibc's malloc_trim(3);
    elsewhere nothing happens). Takes some milliseconds.

    Weights of adapters that come and go leave holes that others do not fit into: a process with three of them resident
    came to hold 25% more than it needed.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
