"""Schemas that a registry fails at: one of them must not hold up its partition for ever."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from core.errors import RecordError, RegistryUnavailable, SchemaUnavailable

FEWEST_TRIES: Final = 3
PROVEN_SHARE: Final = 0.1
"""Of the deadline: so much is enough where another schema of the same registry can be read meanwhile."""
FORGET_SECONDS: Final = 120.0
"""A failure after so long without one is the first: the consumer tries again every ten seconds at the latest."""
MAX_FAILING: Final = 512


@dataclass(slots=True)
class _Failure:
    since: float
    last: float
    tries: int = 0


class FailingSchemas:
    """Since when each schema fails, and when it is given up. Thread safe."""

    def __init__(self, deadline_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """``deadline_seconds``: 0 never gives up."""
        self._deadline = deadline_seconds
        self._clock = clock
        self._failures: OrderedDict[int, _Failure] = OrderedDict()
        self._lock = threading.Lock()

    def succeeded(self, number: int) -> None:
        """The registry gave this schema, or said that there is none."""
        with self._lock:
            self._failures.pop(number, None)

    def failed(self, number: int, error: RegistryUnavailable, is_up: Callable[[], bool]) -> RecordError | None:
        """Count a failure of a schema. Returns what its records are refused with, once it is given up.

        It is given up when the registry has answered, but not with it, for the deadline; or, whatever the failure was,
        when it has failed for a tenth of that and ``is_up`` says that another schema can be read.
        """
        now = self._clock()
        failure = self._count(number, now)
        seconds = now - failure.since
        if not self._deadline or failure.tries < FEWEST_TRIES or seconds < self._deadline * PROVEN_SHARE:
            return None
        if not (isinstance(error, SchemaUnavailable) and seconds >= self._deadline) and not is_up():
            return None
        return RecordError(
            "schema_unavailable",
            f"{error.message} It has failed {failure.tries} times in {seconds:.0f} s.",
            "When the registry has it again, send the record once more (`ratchet resubmit`).",
        )

    def _count(self, number: int, now: float) -> _Failure:
        with self._lock:
            failure = self._failures.pop(number, None)
            if failure is None or now - failure.last > FORGET_SECONDS:
                failure = _Failure(now, now)
            failure.last, failure.tries = now, failure.tries + 1
            self._failures[number] = failure
            while len(self._failures) > MAX_FAILING:
                self._failures.popitem(last=False)
            return failure
