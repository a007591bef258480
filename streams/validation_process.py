"""What runs in a process that validates records for a consumer.

Several threads of one process decode images at once, but wait for each other to run Python; processes do not. A record
that kills the process that validates it does not kill the consumer, either.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Final

from ops.settings import Ingest, Kafka
from streams.crash_guard import DEATHS
from streams.quality.validate import Accepted, Received, Row, Rules, refuse, validate
from streams.registry import SchemaRegistry
from streams.uris import UriFetcher

PARENT_SECONDS: Final = 1.0
"""How often it looks whether its consumer is still there: one that was killed cannot say that it ends."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a process needs to begin."""

    limits: Ingest
    kafka: Kafka
    split_key: bytes

    def rules(self) -> Rules:
        """What records are held against. Its fetcher and its registry live as long as the process."""
        fetcher, registry = UriFetcher(self.limits), SchemaRegistry.of(self.kafka)

        def end() -> None:
            fetcher.close()
            if registry is not None:
                registry.close()

        return Rules(self.limits, self.split_key, fetcher.fetch, registry, end)


class ProcessValidators:
    """Validates in processes of its own, which end with their consumer, however it ends."""

    def __init__(self, work: Work, count: int) -> None:
        self._work = work
        self._count = count
        self._begin()

    def submit(self, records: Sequence[Received]) -> Future[list[Accepted | Row]]:
        """Validate some records. The future raises BrokenProcessPool when one of the processes dies meanwhile."""
        try:
            return self._pool.submit(validate_all, records)
        except BrokenProcessPool:
            self._begin()
            return self._pool.submit(validate_all, records)

    def alone(self, received: Received) -> Accepted | Row:
        """Validate a record while no other one is: if a process dies again, it was this one. Waits for it."""
        for _ in range(DEATHS):
            with suppress(BrokenProcessPool):
                return self.submit([received]).result()[0]
        return refuse(received, "crashed", f"{DEATHS} processes died while they validated this record.")

    def close(self) -> None:
        """End the processes now, in the middle of what they do."""
        for process in list((self._pool._processes or {}).values()):
            process.kill()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self) -> None:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a process for each core: more threads wait for each other
        # Spawned: a fork of a process with threads (Kafka's, Lance's) can inherit a lock that nobody will release.
        self._pool = ProcessPoolExecutor(self._count, get_context("spawn"), _begin, (self._work, os.getpid()))
        self._pool.submit(validate_all, ())  # so that they start now, and not with the first record


def validate_all(records: Sequence[Received]) -> list[Accepted | Row]:
    """In the process: validate some records, those that name an image to fetch at once.

    An image that is the record's own value is left out of the row: the consumer has it.
    """
    results = _threads.map(_validate, records) if _threads is not None else map(_validate, records)
    return list(results)


_rules: Rules
_threads: ThreadPoolExecutor | None = None


def _begin(work: Work, parent: int) -> None:
    global _rules, _threads
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the consumer, which stores what was validated
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _rules = work.rules()
    if work.limits.allowed_uris:
        _threads = ThreadPoolExecutor(work.limits.uri_concurrency, "validate")


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


def _validate(received: Received) -> Accepted | Row:
    result = validate(received, _rules)
    if not isinstance(result, Accepted):
        return {**result, "original": None} if result.get("original") is received.value else result
    row = {**result.row, "image": None} if result.row["image"] is received.value else result.row
    return Accepted(row, None)


def restore(received: Received, result: Accepted | Row) -> Accepted | Row:
    """In the consumer: put back what was left out."""
    if isinstance(result, Accepted):
        row = result.row if result.row["image"] is not None else {**result.row, "image": received.value}
        return Accepted(row, received)
    if result["kind"] == "quarantine":
        return {**result, "original": received.value}
    return result
