"""What validates records for a consumer: processes, or threads of the consumer's own.

Several threads of one process decode images at once, but wait for each other to run Python; processes do not. A record
that kills the process that validates it does not kill the consumer, either; its deaths are counted all the same, by
:mod:`streams.ingest.crash_guard`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from core.child_process import end_with_parent, kill_workers
from core.logs import LogConfig, inherit, inherited
from core.settings.streams import Ingest, Kafka
from streams.ingest.crash_guard import CrashGuard, Notes
from streams.ingest.quality.validate import Accepted, Received, Rules, StoreRow, refuse, validate
from streams.records.registry import SchemaRegistry
from streams.records.uris import UriFetcher


@dataclass(frozen=True, slots=True)
class Work:
    """What a process needs to begin."""

    limits: Ingest
    kafka: Kafka

    @property
    def threads(self) -> int:
        """Of a process: more than one only where it waits for images to be fetched."""
        return self.limits.uri_concurrency if self.limits.allowed_uris else 1

    def rules(self) -> Rules:
        """What records are held against. Its fetcher and its registry live as long as the process."""
        fetcher, registry = UriFetcher(self.limits), SchemaRegistry.of(self.kafka)

        def end() -> None:
            fetcher.close()
            if registry is not None:
                registry.close()

        return Rules(self.limits, fetcher.fetch, registry, end)


class ProcessValidators:
    """Validates in processes of its own, which end with their consumer, however it ends."""

    def __init__(self, work: Work, count: int, guard: CrashGuard) -> None:
        """``guard`` has slots for ``count`` processes of :attr:`Work.threads` each."""
        self._work = work
        self._count = count
        self._guard = guard
        self._begin()

    def submit(self, records: Sequence[Received]) -> Future[list[Accepted | StoreRow]]:
        """Validate some records. The future raises BrokenProcessPool when one of the processes dies meanwhile."""
        try:
            return self._pool.submit(validate_all, records)
        except BrokenProcessPool:
            self._restart()
            return self._pool.submit(validate_all, records)

    def alone(self, received: Received) -> Accepted | StoreRow:
        """Validate a record while no other one is: if a process dies again, it was this one. Waits for it."""
        self._count_deaths()
        while not self._guard.is_poison(received.record_position):
            deaths = self._guard.deaths(received.record_position)
            try:
                return self.submit([received]).result()[0]
            except BrokenProcessPool:
                self._restart()
                if self._guard.deaths(received.record_position) == deaths:
                    self._guard.died(received.record_position)
        return crashed(received, self._guard)

    def close(self) -> None:
        """End the processes now, in the middle of what they do. What they have noted is no death of a record: the guard
        is emptied behind this.
        """
        kill_workers(self._pool)

    def _restart(self) -> None:
        """Replace processes of which one has died, and count whose deaths these were."""
        self._count_deaths()
        self._begin()

    def _count_deaths(self) -> None:
        if self._pool._broken:
            self._pool.shutdown(wait=True, cancel_futures=True)  # the others are ended, too
            self._guard.count_deaths()

    def _begin(self) -> None:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a process for each core: more threads wait for each other
        # Spawned: a fork of a process with threads (Kafka's, Lance's) can inherit a lock that nobody will release.
        context = get_context("spawn")
        arguments = (self._work, self._guard.path, context.Value("i", 0), inherited())
        self._pool = ProcessPoolExecutor(self._count, context, _begin, arguments)
        for _ in range(self._count):  # so that they start now, and not with the first records: the pool starts one for
            self._pool.submit(validate_all, ())  # each piece of work for which none is idle


def validate_all(records: Sequence[Received]) -> list[Accepted | StoreRow]:
    """In the process: validate some records, those that name an image to fetch at once.

    An image that is the record's own value is left out of the row: the consumer has it.
    """
    results = _threads.map(_validate, records) if _threads is not None else map(_validate, records)
    return list(results)


def crashed(received: Received, guard: CrashGuard) -> StoreRow:
    """The refusal of a record at which too many processes died."""
    deaths = guard.deaths(received.record_position)
    return refuse(received, "crashed", f"a process died {deaths} times while it validated this record.")


_rules: Rules
_notes: Notes
_threads: ThreadPoolExecutor | None = None


def _begin(work: Work, path: Path, started: Any, log: LogConfig | None) -> None:
    """``started``: a shared number of the processes that began before."""
    global _rules, _notes, _threads
    inherit(log)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the consumer, which stores what was validated
    end_with_parent()
    _rules = work.rules()
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    _notes = Notes.of_process(path, number, work.threads)
    if work.threads > 1:
        _threads = ThreadPoolExecutor(work.threads, "validate")


def _validate(received: Received) -> Accepted | StoreRow:
    with _notes.validating(received.record_position):
        result = validate(received, _rules)
    if not isinstance(result, Accepted):
        return {**result, "original": None} if result.get("original") is received.value else result
    row = {**result.row, "image": None} if result.row["image"] is received.value else result.row
    return replace(result, row=row, record=None)


def restore(received: Received, result: Accepted | StoreRow) -> Accepted | StoreRow:
    """In the consumer: put back what was left out."""
    if isinstance(result, Accepted):
        row = result.row if result.row["image"] is not None else {**result.row, "image": received.value}
        return replace(result, row=row, record=received)
    if result["kind"] == "quarantine":
        return {**result, "original": received.value}
    return result


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
