"""Waiting for a condition that nothing announces."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

STILL_SECONDS: Final = 120.0
"""After so long without any movement nothing will move: a shared machine stands still for seconds."""
BUSY_SECONDS: Final = 900.0
"""Work that computes without getting anywhere is given up after so long: loading a model, without a word, takes minutes
on a machine with ten times as much to do as it can."""
TELL_SECONDS: Final = 15.0
LOOK_SECONDS: Final = 2.0
"""From one look at the progress to the next: it may cost more than the condition."""


class StoodStill(TimeoutError):
    """Nothing has moved for too long. Says what moved last, and when."""


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
    """Ask until a condition is true, for as long as it takes while something moves.

    >>> wait_for_progress(lambda: stored() >= 500, lambda: f"{stored()} of 500 records", tell=say)

    Args:
        progress: how far it is. The clock starts again whenever this changes. Its text is shown.
        work: a sign that something is done, such as the processor time of processes. It gives no more than
            ``busy_seconds``: a process that hangs may compute as well.
        tell: called with the progress when that changed, every :data:`TELL_SECONDS` at most.
        still_seconds: how long neither may change.
        pause: seconds between two questions.

    Raises:
        StoodStill: nothing has changed for so long.
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
