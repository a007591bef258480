"""Workers that share no index may store the same content at once; afterwards there is one sample and one duplicate."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from core.settings.streams import Ingest, Kafka
from streams.ingest.batch import Batch
from streams.ingest.duplicates import DuplicateIndex
from streams.ingest.membership import Reading
from streams.ingest.validate import Received, Rules, validate
from streams.store import maintenance
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from streams.store.writer import StoreWriter
from tests.support.kafka import good

RULES = Rules(Ingest())
SAME = 1


class Worker:
    """Reads one partition, with a home of its own."""

    def __init__(self, root: Path, partition: int) -> None:
        self.partition = partition
        self.store = SampleStore(str(root / "lake"))
        self.writer = StoreWriter(self.store.table)
        self.file = root / f"home-{partition}" / "duplicates.db"
        self.index = DuplicateIndex(self.file, self.store.table.identity()[0])
        self.batch = Batch(Kafka(), self.writer, self.index)
        [claim] = self.writer.claim([Position("t", partition, 0)])
        self.reading = Reading(claim, 0)

    def take(self, *seeds: int) -> None:
        for seed in seeds:
            value, headers = good(seed)
            record = Received("t", self.partition, self.reading.next, value, None, headers)
            self.reading.next += 1
            self.batch.add(self.reading, self.reading.next, validate(record, RULES), 100)

    def commit(self) -> None:
        self.batch.commit(lambda reading: None)


@pytest.fixture
def workers(tmp_path: Path) -> tuple[Worker, Worker]:
    return Worker(tmp_path, 0), Worker(tmp_path, 1)


def store_at_once(first: Worker, second: Worker, *seeds: int) -> None:
    """Both decide before either commits."""
    for worker in (first, second):
        worker.take(*seeds)
    together = threading.Barrier(2)
    failures: list[BaseException] = []
    threads = [threading.Thread(target=_commit, args=(each, together, failures)) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []


def _commit(worker: Worker, together: threading.Barrier, failures: list[BaseException]) -> None:
    writer: Any = worker.writer
    commit = writer.commit

    def after_both_decided(*given: Any) -> Any:
        together.wait(30)
        writer.commit = commit
        return commit(*given)

    writer.commit = after_both_decided
    try:
        worker.commit()
    except BaseException as error:
        failures.append(error)
        together.abort()


def kinds(store: SampleStore) -> list[tuple[int, str]]:
    return [(row["partition"], row["kind"]) for row in store.records().to_pylist()]


def test_both_store_it_when_neither_can_know(workers: tuple[Worker, Worker]) -> None:
    """What the others are about."""
    store_at_once(*workers, SAME)
    assert kinds(workers[0].store) == [(0, "sample"), (1, "sample")]


@pytest.mark.parametrize("noticing", [0, 1])
def test_whoever_notices_first_makes_the_later_position_a_duplicate(
    workers: tuple[Worker, Worker], noticing: int
) -> None:
    store_at_once(*workers, SAME)
    noticed, other = workers[noticing], workers[1 - noticing]
    noticed.take(2)
    noticed.commit()
    store = noticed.store
    [duplicate] = [row for row in store.records().to_pylist() if row["kind"] == "duplicate"]
    assert (duplicate["partition"], duplicate["offset"], duplicate["reason"]) == (1, 0, "duplicate_exact")
    assert duplicate["duplicate_of"] == duplicate["id"]
    assert (store.tally()["sample"], store.tally()["duplicate"]) == (2, 1)
    other.take(3)
    other.commit()
    assert (store.tally()["sample"], store.tally()["duplicate"]) == (3, 1), "the other one has nothing left to do"


def test_both_may_notice_at_once(workers: tuple[Worker, Worker]) -> None:
    store_at_once(*workers, SAME, 2, 3)
    store_at_once(*workers, 4)
    for worker in workers:  # a conflict between them may leave some to the next batch
        worker.take(10 + worker.partition)
        worker.commit()
    store = workers[0].store
    ids = store.scan(columns=["id"])["id"].to_pylist()
    assert len(ids) == len(set(ids)) == 6
    assert (store.tally()["sample"], store.tally()["duplicate"]) == (6, 4)
    assert {row["partition"] for row in store.records().to_pylist() if row["kind"] == "duplicate"} == {1}


def test_after_that_it_is_a_duplicate_for_both_and_for_who_starts_anew(
    workers: tuple[Worker, Worker], tmp_path: Path
) -> None:
    store_at_once(*workers, SAME)
    for worker in workers:
        worker.take(SAME)
        worker.commit()
    newcomer = Worker(tmp_path, 2)
    newcomer.take(SAME)
    newcomer.commit()
    store = newcomer.store
    assert kinds(store) == [
        (0, "sample"), (0, "duplicate"), (1, "duplicate"), (1, "duplicate"), (2, "duplicate"),
    ]  # fmt: skip


def test_a_double_that_was_deleted_meanwhile_is_no_double(workers: tuple[Worker, Worker]) -> None:
    store_at_once(*workers, SAME)
    store = workers[0].store
    [sample_id] = set(store.scan(columns=["id"])["id"].to_pylist())
    assert len(StoreWriter(store.table).remove(f"id = '{sample_id}'", "deletion", "d")) == 2
    for worker in workers:
        worker.take(5 + worker.partition)
        worker.commit()
    assert (store.tally()["sample"], store.tally()["duplicate"], store.tally()["deleted"]) == (2, 0, 2)
    workers[0].take(SAME)
    workers[0].commit()
    assert store.tally()["sample"] == 3, "sent again after its deletion, it is a sample again"


def test_what_was_deleted_leaves_the_index_with_its_look(workers: tuple[Worker, Worker]) -> None:
    worker = workers[0]
    worker.take(1, 2, 3)
    worker.commit()
    gone = worker.store.select("kind = 'sample' AND offset < 2", ["id"])
    StoreWriter(worker.store.table).remove("offset < 2", "deletion", "d")
    worker.take(4)
    worker.commit()
    for table in ("ids", "looks"):
        known = {row[0].hex() for row in worker.index._db.execute(f"SELECT id FROM {table}")}
        assert not known & {row["id"] for row in gone} and len(known) == 2


def test_what_was_merged_before_a_worker_looked_is_known_to_it(workers: tuple[Worker, Worker]) -> None:
    """Maintenance moves rows; those that a worker has not seen are no less new to it."""
    busy, idle = workers
    idle.take(9)
    idle.commit()
    for seed in (1, 2):
        busy.take(seed)
        busy.commit()
    StoreWriter(busy.store.table).remove("partition = 1", "deletion", "d")
    parts = [each.id for each in maintenance._fragments(busy.store)]
    assert StoreWriter(busy.store.table).merge(parts, 64) > 0
    idle.take(1, 9)
    idle.commit()
    rows = [(row["offset"], row["kind"]) for row in idle.store.records().to_pylist() if row["partition"] == 1]
    assert rows == [(0, "deleted"), (1, "duplicate"), (2, "sample")]
