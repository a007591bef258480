"""What a consumer is made of that outlives a connection to the broker."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from core.settings import Settings
from streams.ingest.batch import Batch
from streams.ingest.crash_guard import CrashGuard
from streams.ingest.membership import POLL_RECORDS
from streams.ingest.quality.duplicates import DuplicateIndex
from streams.ingest.quality.sides import SplitRule
from streams.ingest.quarantine import RefusalPublisher
from streams.ingest.validation_pool import ValidationPool, Validators
from streams.ingest.validators import ProcessValidators, ThreadValidators, Work
from streams.store.sample_store import SampleStore
from streams.store.table import SampleTable
from streams.store.writer import StoreWriter


@dataclass(frozen=True, slots=True)
class ConsumerParts:
    """What outlives a connection to the broker."""

    guard: CrashGuard
    writer: StoreWriter
    batch: Batch
    pool: ValidationPool
    publisher: RefusalPublisher
    indexing: Indexing

    @classmethod
    def open(cls, settings: Settings, store: SampleStore, processes: int) -> ConsumerParts:
        """``processes``: that validate; with 0, threads do. Raises StoreUnavailable."""
        limits, kafka, folder = settings.ingest, settings.kafka, settings.home / "ingest"
        name, split_key = store.table.identity()
        if limits.split_key is not None:
            split_key = hashlib.sha256(limits.split_key.get_secret_value().encode()).digest()
        split = SplitRule(split_key, limits.fresh_eval_share)
        index = DuplicateIndex(folder / "duplicates.db", name, limits.near_duplicate_distance, split)
        writer = StoreWriter(store.table)
        guard, validators = _validators(Work(limits, kafka), processes, folder)
        records = 2 * kafka.batch_records + POLL_RECORDS
        return cls(
            guard,
            writer,
            Batch(kafka, writer, index),
            ValidationPool(validators, 2 * kafka.batch_bytes, records),
            RefusalPublisher(kafka, store),
            Indexing(index, store.table),
        )

    def close(self) -> None:
        """End; what is inside is given up."""
        self.pool.close()
        self.publisher.close()
        self.indexing.stop()
        self.batch.index.close()
        self.guard.close()


def _validators(work: Work, processes: int, folder: Path) -> tuple[CrashGuard, Validators]:
    if processes:
        guard = CrashGuard(folder, processes * work.threads)
        return guard, ProcessValidators(work, processes, guard)
    threads = (os.cpu_count() or 1) + work.threads - 1
    guard = CrashGuard(folder, threads)
    return guard, ThreadValidators(work, threads, guard)


class Indexing:
    """Reads into the index what the store holds, on a thread of its own: some 10 s for each million samples where there
    is no index yet. The loop polls meanwhile, without claiming anything, so that the group keeps this member."""

    def __init__(self, index: DuplicateIndex, table: SampleTable) -> None:
        self._index = index
        self._table = table
        self._executor = ThreadPoolExecutor(1, "duplicate-index")
        self._run: Future[None] | None = None
        self._stopping = False

    def start(self) -> None:
        """Begin, unless it runs already. Nobody else may use the index until it is :meth:`done`."""
        if self._run is None or self._run.done():
            self._run = self._executor.submit(self._follow)

    def done(self) -> bool:
        """Whether the index is up to date.

        Raises:
            StoreUnavailable: the store cannot be read, or the index not be written; :meth:`start` tries again.
        """
        if self._run is None or not self._run.done():
            return False
        self._run.result()
        return True

    def stop(self) -> None:
        """End it soon; what it has read in vain is read again by the next process."""
        self._index.interrupt()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _follow(self) -> None:
        with self._index.deciding():
            self._index.follow(self._table)
