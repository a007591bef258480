from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.errors import StoreFull, StoreUnavailable, Superseded
from core.settings.streams import Kafka
from streams.ingest.validate import Accepted
from streams.store.rows import Position
from tests.support.kafka import good
from tests.support.worker import POISON, Worker
from tests.unit.streams.conftest import Outage


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return Worker(tmp_path)


def outcomes(worker: Worker) -> list[str]:
    return [kind for *_, kind in worker.kinds()]


def test_what_is_no_longer_ours_is_not_stored(worker: Worker) -> None:
    worker.take(1, 2)
    worker.batch.drop(lambda reading: False)
    outcome = worker.commit()
    assert (outcome.readings, outcome.version, len(worker.batch)) == ([], 0, 0)
    assert (worker.store.count(), worker.store.offsets()) == (0, {"t:0": 0})


def test_a_process_that_slept_cannot_store_what_another_stored_meanwhile(tmp_path: Path) -> None:
    sleeper = Worker(tmp_path)
    sleeper.take(1, 2, 3)
    other = Worker(tmp_path)
    other.take(1, 2, 3)
    other.commit()
    with pytest.raises(Superseded, match="t:0"):
        sleeper.commit()
    assert len(sleeper.batch) == 3, "which partition is lost is the consumer's to say"
    assert outcomes(other) == ["sample"] * 3
    assert Worker(tmp_path).reading.next == 3


def test_duplicates_are_found_in_the_batch_and_in_the_store_and_by_the_next_process(tmp_path: Path) -> None:
    first = Worker(tmp_path)
    first.take(1, 1, 2)
    assert first.commit().duplicates == {"exact": 1}
    first.take(2, 3)
    assert first.commit().duplicates == {"exact": 1}
    again = Worker(tmp_path)
    again.take(1, 2, 3, 4)
    outcome = again.commit()
    assert (outcome.duplicates, outcome.samples.total()) == ({"exact": 3}, 1)
    assert again.store.count() == again.store.scan(columns=["id"]).num_rows == 4
    of = {row["duplicate_of"] for row in again.store.records().to_pylist()}
    assert of - {None} == {each.row["id"] for each in map(again.validated, (1, 2, 3)) if isinstance(each, Accepted)}


def test_the_position_the_tally_and_the_rows_are_in_step(worker: Worker) -> None:
    worker.take(1, 1, POISON, 2)
    worker.reading.leader_epoch = 7
    outcome = worker.commit()
    position = worker.store.positions()["t:0"]
    assert (position.next, position.published, position.leader_epoch) == (4, 2, 7)
    assert worker.reading.stored == 4 and outcome.version == worker.store.version()
    assert [position.tally[name] for name in ("sample", "duplicate", "quarantine")] == [2, 1, 1]
    assert (outcome.records, outcome.size, len(outcome.of_kind("quarantine"))) == (4, 400, 1)


@pytest.mark.parametrize(("unpublished", "expected"), [(None, 4), (1, 1), (9, 4)])
def test_published_goes_as_far_as_the_publisher_has_come(
    worker: Worker, unpublished: int | None, expected: int
) -> None:
    worker.take(1, 2, 3, 4)
    worker.commit(unpublished)
    assert worker.store.positions()["t:0"].published == expected


@pytest.mark.parametrize(
    ("bounds", "most"),
    [({"batch_records": 3}, 3), ({}, 11), ({"batch_seconds": 1e-9}, 1)],
    ids=["records", "bytes", "seconds"],
)
def test_a_batch_is_bounded(tmp_path: Path, bounds: dict[str, Any], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.ingest.batch.BATCH_BYTES", 1024)
    worker = Worker(tmp_path, kafka=Kafka(**{"batch_seconds": 100, **bounds}))
    assert not worker.batch.due and worker.batch.seconds_left == float("inf")
    for number in range(most):
        assert not worker.batch.due
        worker.take(number)
    assert worker.batch.due and worker.batch.seconds_left <= 100


def test_a_store_that_is_away_leaves_the_batch_and_the_index_as_they_were(worker: Worker, outage: Outage) -> None:
    worker.take(1, POISON, 2)
    away = outage(worker.writer, "commit", StoreUnavailable("away"))
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            worker.commit()
    assert (len(worker.batch), len(worker.index)) == (3, 0)
    away.clear()
    assert worker.commit().duplicates == {}
    assert outcomes(worker) == ["sample", "quarantine", "sample"]


def test_a_valid_sample_that_the_table_cannot_hold_is_quarantined_and_its_neighbours_are_stored(worker: Worker) -> None:
    worker.take(1)
    for fields in ({"text": "\ud83d"}, {"width": 2**31}, {"tags": 7}):
        bad = worker.validated(2)
        assert isinstance(bad, Accepted)
        worker.add(replace(bad, row={**bad.row, **fields}))
    worker.take(2, 3)
    outcome = worker.commit()
    quarantined = outcome.of_kind("quarantine")
    assert [(row["offset"], row["reason"]) for row in quarantined] == [(n, "internal") for n in (1, 2, 3)]
    assert {row["original"] for row in quarantined} == {good(2)[0]}
    assert outcomes(worker) == ["sample", *["quarantine"] * 3, "sample", "sample"]
    assert outcome.duplicates == {}, "a quarantined sample is nobody's original"


# -- an index or a store that fails -------------------------------------------------------------------------------


class NoCommit:
    """A database whose disk is full at the commit of a transaction."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self.database = database

    def execute(self, statement: str, *values: Any) -> Any:
        if statement == "COMMIT":
            raise sqlite3.OperationalError("database or disk is full")
        return self.database.execute(statement, *values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.database, name)


def test_what_is_stored_is_not_stored_again_when_the_index_cannot_be_kept(worker: Worker) -> None:
    worker.take(1, POISON)
    database = worker.index._db
    worker.index._db = NoCommit(database)  # type: ignore[assignment]
    outcome = worker.commit()
    worker.index._db = database
    assert [row["kind"] for row in outcome.rows] == ["sample", "quarantine"]
    assert len(worker.batch) == 0
    worker.take(1, 2)
    worker.commit()
    assert outcomes(worker) == ["sample", "quarantine", "duplicate", "sample"]


def test_an_index_that_was_full_works_again_when_there_is_room(worker: Worker) -> None:
    [pages] = worker.index._db.execute("PRAGMA page_count").fetchone()
    worker.index._db.execute(f"PRAGMA max_page_count = {pages}")
    worker.take(*range(200))
    with pytest.raises(StoreFull):
        worker.commit()
    assert (outcomes(worker), len(worker.batch)) == ([], 200)
    worker.index._db.execute("PRAGMA max_page_count = 1000000")
    worker.commit()
    assert outcomes(worker) == ["sample"] * 200


def test_a_double_that_cannot_be_settled_now_is_settled_with_the_next_batch(worker: Worker, outage: Outage) -> None:
    worker.take(1)
    worker.commit()
    [sample] = worker.store.scan().to_pylist()
    worker.store.put([{**sample, "kind": "sample", "partition": 1}], [Position("t", 1, 1)])  # of a worker elsewhere
    away = outage(worker.writer, "settle_double", StoreUnavailable("away"))
    worker.take(2, POISON)
    assert [row["kind"] for row in worker.commit().rows] == ["sample", "quarantine"]
    away.clear()
    worker.take(3)
    worker.commit()
    assert outcomes(worker).count("duplicate") == 1
    assert worker.store.scan(columns=["id"])["id"].to_pylist().count(sample["id"]) == 1
