"""An ingest worker without a broker: it validates records of one partition and commits them in batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from core.settings.streams import Ingest, Kafka
from core.settings.trust import Trust
from streams.ingest.batch import Batch, CommitResult
from streams.ingest.duplicates import DuplicateIndex
from streams.ingest.membership import PartitionReader, start_position
from streams.ingest.perceptual_hash import SplitRule
from streams.ingest.sources import Holds
from streams.ingest.validate import Accepted, Received, Rules, StoreRow, validate
from streams.store.sample_store import SampleStore
from streams.store.writer import StoreWriter
from tests.support.kafka import good

RULES = Rules(Ingest())
POISON = -1
"""The seed of a record that is not a sample."""


class Worker:
    """Reads a partition of the topic ``t`` into the lake of a folder, with its own duplicate index there."""

    def __init__(
        self, root: Path, partition: int = 0, *, kafka: Kafka | None = None, distance: int = 0,
        split: SplitRule | None = None,
    ) -> None:  # fmt: skip
        self.partition, self.distance, self.split = partition, distance, split
        self.store = SampleStore(str(root / "lake"))
        self.writer = StoreWriter(self.store.table)
        self.index = self.new_index(root / f"home-{partition}" / "duplicates.db")
        self.batch = Batch(kafka or Kafka(), self.writer, self.index, Holds(Trust(), self.store.table))
        start = start_position(self.store.positions().values(), "t", "id-1", partition, 0)
        self.reading = PartitionReader.of(self.writer.claim([start])[0])

    def new_index(self, path: Path) -> DuplicateIndex:
        return DuplicateIndex(path, self.store.table.identity()[0], self.distance, self.split)

    def follow_anew(self, path: Path) -> None:
        self.index = self.batch.index = self.new_index(path)

    def take(self, *seeds: int) -> None:
        for seed in seeds:
            self.add(self.validated(seed))

    def validated(self, seed: int) -> Accepted | StoreRow:
        return self.judged(*((b"poison", []) if seed == POISON else good(seed)))

    def judged(
        self,
        value: bytes | None,
        headers: Sequence[tuple[str, bytes | None]] = (),
        key: bytes | None = None,
        time: int = -1,
    ) -> Accepted | StoreRow:
        return validate(Received("t", self.partition, self.reading.next, value, key, headers, time), RULES)

    def add(self, result: Accepted | StoreRow) -> None:
        self.reading.next += 1
        self.batch.add(self.reading, self.reading.next, result, 100)

    def commit(self, unpublished: int | None = None) -> CommitResult:
        return self.batch.commit(lambda reading: unpublished)

    def kinds(self) -> list[tuple[int, int, str]]:
        rows = self.store.records().to_pylist()
        return [(row["partition"], row["offset"], row["kind"]) for row in rows]
