"""Polling for conditions."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

STILL_SECONDS: Final = 120.0
"""Time without any movement after which nothing will move: a shared machine stands still for seconds."""
BUSY_SECONDS: Final = 900.0
"""Limit for work that computes without progress: loading a model silently takes minutes on a machine with a tenfold
load."""
TELL_SECONDS: Final = 15.0
LOOK_SECONDS: Final = 2.0
"""Interval of progress checks, which may cost more than the condition."""


class StoodStill(TimeoutError):
    """Nothing has moved for too long; the message says what moved last, and when."""


def wait_until(
    condition: Callable[[], object], seconds: float, *, pause: float = 0.1, alive: Callable[[], bool] = lambda: True
) -> bool:
    """Poll until a condition is true. False after ``seconds``, or as soon as ``alive()`` is false. ``pause`` is in
    seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline or not alive():
            return False
        time.sleep(pause)
    return True


def wait_for_progress(
    condition: Callable[[], object],
    progress: Callable[[], object],
    *,
    work: Callable[[], object] = lambda: None,
    tell: Callable[[str], object] = lambda text: None,
    still_seconds: float = STILL_SECONDS,
    busy_seconds: float = BUSY_SECONDS,
    pause: float = 0.1,
) -> None:
    """Poll until a condition is true, for as long as something moves.

    Args:
        progress: the progress as text. The clock restarts whenever it changes.
        work: a sign of activity, such as the CPU time of processes. It extends the wait to at most ``busy_seconds``: a
            hanging process may compute as well.
        tell: called with changed progress, at most every :data:`TELL_SECONDS`.

    Raises StoodStill if neither has changed for ``still_seconds``.
    """
    began = moved = worked = told = looked = time.monotonic()
    last: object = None
    last_work: object = None
    while not condition():
        now = time.monotonic()
        if last is None or now - looked >= min(LOOK_SECONDS, still_seconds / 10):
            seen, done, looked = progress(), work(), now
            if seen != last:
                last, moved = seen, now
                if now - told > TELL_SECONDS:
                    told = now
                    tell(f"{seen} after {now - began:.0f} s")
            if done != last_work:
                last_work, worked = done, now
        if now - moved > busy_seconds:
            raise StoodStill(f"nothing has come of what is computed for {now - moved:.0f} s; last: {last}")
        if now - max(moved, worked) > still_seconds:
            raise StoodStill(f"nothing has moved for {now - max(moved, worked):.0f} s; last: {last}")
        time.sleep(pause)
