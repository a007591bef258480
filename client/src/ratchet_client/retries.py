"""Retries: which failed calls are repeated, and after which pause."""

from __future__ import annotations

import random
import time
from typing import Any

from ratchet_client.calls import Call
from ratchet_client.errors import Overloaded, ServerError, TimedOut, Unreachable

FIRST_PAUSE = 0.25
LONGEST_PAUSE = 8.0
"""Seconds. Each pause is twice as long as the one before, and up to half of it is left to chance, so that clients that
failed together do not come back together."""


class Retries:
    """The tries of one call.

    Another try is made where the call changes nothing, and the server was away or had too much to do. A call that was
    not answered in time is not made again: the server has not ended the first one yet. All pauses together are shorter
    than the timeout of the call.
    """

    def __init__(self, call: Call[Any], retries: int, timeout: float) -> None:
        self._left = retries if call.repeatable else 0
        self._pause = FIRST_PAUSE
        self._ends_at = time.monotonic() + (timeout if call.timeout is None else call.timeout)

    def pause_after(self, error: ServerError) -> float:
        """Seconds to wait before the next try; raises the error where there is to be none."""
        passing = isinstance(error, (Overloaded, Unreachable)) and not isinstance(error, TimedOut)
        pause = self._pause * random.uniform(0.5, 1.0) + (error.retry_after or 0.0)  # noqa: S311  no secret
        if not (passing and self._left) or time.monotonic() + pause > self._ends_at:
            raise error
        self._left -= 1
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        return pause
