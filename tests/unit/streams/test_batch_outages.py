"""A batch whose index or store fails: it is stored once or not at all, and nothing is stuck afterwards."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from core.errors import StoreFull, StoreUnavailable
from core.settings.streams import Ingest, Kafka
from streams.ingest.batch import Batch
from streams.ingest.duplicates import DuplicateIndex
from streams.ingest.membership import PartitionReader
from streams.ingest.validate import Received, Rules, validate
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from streams.store.writer import StoreWriter
from tests.support.kafka import good

RULES = Rules(Ingest())


class Worker:
    """A partition as one process sees it."""

    def __init__(self, folder: Path) -> None:
        self.store = SampleStore(str(folder / "lake"))
        self.writer = StoreWriter(self.store.table)
        self.index = DuplicateIndex(folder / "duplicates.db", "store")
        self.batch = Batch(Kafka(), self.writer, self.index)
        [claim] = self.writer.claim([Position("t", 0, 0)])
        self.reading = PartitionReader(claim, claim.position.next)

    def take(self, *seeds: int) -> None:
        """Read records: a picture for each seed, and for -1 nothing that is one."""
        for seed in seeds:
            value, headers = (b"", []) if seed < 0 else good(seed)
            result = validate(Received("t", 0, self.reading.next, value, None, headers), RULES)
            self.reading.next += 1
            self.batch.add(self.reading, self.reading.next, result, 100)

    def kinds(self) -> list[str]:
        return list(self.store.records()["kind"].to_pylist())


class NoCommit:
    """A database whose disk is full when a transaction is to be kept."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self.database = database

    def execute(self, statement: str, *values: Any) -> Any:
        if statement == "COMMIT":
            raise sqlite3.OperationalError("database or disk is full")
        return self.database.execute(statement, *values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.database, name)


def test_what_is_stored_is_not_stored_again_when_the_index_cannot_be_kept(tmp_path: Path) -> None:
    worker = Worker(tmp_path)
    worker.take(1, -1)
    database = worker.index._db
    worker.index._db = NoCommit(database)  # type: ignore[assignment]
    outcome = worker.batch.commit(lambda reading: None)
    worker.index._db = database
    assert [row["kind"] for row in outcome.rows] == ["sample", "quarantine"]
    assert len(worker.batch) == 0
    worker.take(1, 2)
    worker.batch.commit(lambda reading: None)
    assert worker.kinds() == ["sample", "quarantine", "duplicate", "sample"]


def test_an_index_that_was_full_works_again_when_there_is_room(tmp_path: Path) -> None:
    worker = Worker(tmp_path)
    [pages] = worker.index._db.execute("PRAGMA page_count").fetchone()
    worker.index._db.execute(f"PRAGMA max_page_count = {pages}")
    worker.take(*range(200))
    with pytest.raises(StoreFull):
        worker.batch.commit(lambda reading: None)
    assert (worker.kinds(), len(worker.batch)) == ([], 200)
    worker.index._db.execute("PRAGMA max_page_count = 1000000")
    worker.batch.commit(lambda reading: None)
    assert worker.kinds() == ["sample"] * 200


def test_a_double_that_cannot_be_settled_now_is_settled_with_the_next_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(tmp_path)
    worker.take(1)
    worker.batch.commit(lambda reading: None)
    [sample] = worker.store.scan().to_pylist()
    worker.store.put([{**sample, "kind": "sample", "partition": 1}], [Position("t", 1, 1)])  # of a worker elsewhere
    settle = worker.writer.settle_double

    def away(*_: Any) -> bool:
        raise StoreUnavailable("the store is away.", "Wait.")

    monkeypatch.setattr(worker.writer, "settle_double", away)
    worker.take(2, -1)
    assert [row["kind"] for row in worker.batch.commit(lambda reading: None).rows] == ["sample", "quarantine"]
    monkeypatch.setattr(worker.writer, "settle_double", settle)
    worker.take(3)
    worker.batch.commit(lambda reading: None)
    assert worker.store.records()["kind"].to_pylist().count("duplicate") == 1
    assert worker.store.scan(columns=["id"])["id"].to_pylist().count(sample["id"]) == 1
