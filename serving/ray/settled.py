"""What a replica's process holds once it has started."""

from __future__ import annotations

import gc


def settle() -> None:
    """Call it last in a replica's constructor: what is there by now stays, and the garbage collector need not look at
    it again.

    Some 600,000 objects are of torch, Ray and what they import. To go through them takes a third of a second and more,
    in which no thread of the process goes on, and each adapter that is loaded is reason enough to do it.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # of nothing: the next one comes when a quarter of what this one has looked at is new
