"""Settings of a replica's interpreter once it has started: its garbage collector, and its threads."""

from __future__ import annotations

import gc
import sys

SWITCH_SECONDS = 0.0005
"""After which a thread lets another one have the interpreter. With Python's own 5 ms an event loop, which wakes up some
thirty times for a request, waits for 150 ms while other threads read pictures."""


def settle() -> None:
    """Call it last in a replica's constructor: what is there by now stays, and the garbage collector need not look at
    it again.

    Some 600,000 objects are of torch, Ray and what they import. To go through them takes a third of a second and more,
    in which no thread of the process goes on, and each adapter that is loaded is reason enough to do it.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()
    gc.collect()  # of nothing: the next one comes when a quarter of what this one has looked at is new
