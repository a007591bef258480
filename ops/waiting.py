"""Waiting for a condition that nothing announces."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(
    condition: Callable[[], object],
    seconds: float,
    *,
    pause: float = 0.1,
    alive: Callable[[], bool] = lambda: True,
) -> bool:
    """Ask until a condition is true. False when it is not within ``seconds``, or when ``alive`` is false before.

    Args:
        pause: seconds between two questions.
        alive: whether there is a point in waiting, such as that a process still runs.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline or not alive():
            return False
        time.sleep(pause)
    return True
