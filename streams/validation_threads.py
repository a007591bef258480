"""Validating records on threads of the consumer's process."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from streams.crash_guard import CrashGuard
from streams.quality.validate import Accepted, Received, StoreRow, validate
from streams.validation_process import Work


class ThreadValidators:
    """Validates on threads of this process, which start at once and share its GIL: about half as fast as processes."""

    def __init__(self, work: Work, count: int, guard: CrashGuard) -> None:
        """``guard`` has a slot for each of the ``count`` threads."""
        self._guard = guard
        self._rules = work.rules()
        self._threads = ThreadPoolExecutor(count, "validate")

    def submit(self, records: Sequence[Received]) -> Future[list[Accepted | StoreRow]]:
        """Validate some records, in the background."""
        return self._threads.submit(lambda: [self._validate(received) for received in records])

    def alone(self, received: Received) -> Accepted | StoreRow:
        """Validate a record here."""
        return self._validate(received)

    def close(self) -> None:
        """Let the threads end; what is being validated is given up."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._rules.end()

    def _validate(self, received: Received) -> Accepted | StoreRow:
        with self._guard.validating(received.record_position):
            return validate(received, self._rules)
