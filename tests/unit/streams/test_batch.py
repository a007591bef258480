from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kafka import TopicPartition

from core.errors import StoreFull, StoreUnavailable, Superseded
from core.settings.streams import Kafka
from streams.ingest.membership import Assignment, PartitionReader, new_generation, start_position
from streams.ingest.validate import Accepted
from streams.store.rows import Position
from streams.store.writer import Claim
from tests.support.kafka import good
from tests.support.worker import POISON, Worker
from tests.unit.streams.conftest import Outage


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return Worker(tmp_path)


def outcomes(worker: Worker) -> list[str]:
    return [kind for *_, kind in worker.kinds()]


def test_a_process_that_slept_cannot_store_what_another_stored_meanwhile(tmp_path: Path) -> None:
    sleeper = Worker(tmp_path)
    sleeper.take(1, 2, 3)
    other = Worker(tmp_path)
    other.take(1, 2, 3)
    other.commit()
    with pytest.raises(Superseded, match="t:0"):
        sleeper.commit()
    assert len(sleeper.batch) == 3, "which partition is lost is the consumer's to say"
    sleeper.batch.drop(lambda reading: False)
    outcome = sleeper.commit()
    assert (outcome.readings, outcome.version, len(sleeper.batch)) == ([], 0, 0)
    assert outcomes(other) == ["sample"] * 3 and Worker(tmp_path).reading.next == 3


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


@pytest.mark.parametrize(("unpublished", "published"), [(None, 2), (1, 1), (9, 2)])
def test_the_position_the_tally_and_the_rows_are_in_step(
    worker: Worker, unpublished: int | None, published: int
) -> None:
    """What is published ends before the first refusal of the batch, and where the publisher has come."""
    worker.take(1, 1, POISON, 2)
    worker.reading.leader_epoch = 7
    outcome = worker.commit(unpublished)
    position = worker.store.positions()["t:0"]
    assert (position.next, position.published, position.leader_epoch) == (4, published, 7)
    assert worker.reading.stored == 4 and outcome.version == worker.store.version()
    assert [position.tally[name] for name in ("sample", "duplicate", "quarantine")] == [2, 1, 1]
    assert (outcome.records, outcome.size, len(outcome.of_kind("quarantine"))) == (4, 400, 1)


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


ONE = Position("t", 0, 7, "id-1", 5)
LOGS = [ONE, Position("t", 1, 9, "id-1"), Position("t@1", 0, 2, "id-2")]


@pytest.mark.parametrize(
    ("known", "topic", "topic_id", "partition", "first", "expected"),
    [
        ([ONE], "t", "id-1", 0, 3, ONE),  # the same log
        ([ONE], "t", "id-2", 0, 0, Position("t@1", 0, 0, "id-2", 0)),  # a new one
        ([], "t", "id-1", 0, 3, Position("t", 0, 3, "id-1", 3)),
        ([ONE], "u", "id-1", 0, 0, Position("u", 0, 0, "id-1", 0)),
        ([ONE], "t", "", 0, 0, ONE),  # missing information of the broker is not a reason to start over
        ([Position("t", 0, 7, "", 5)], "t", "id-1", 0, 0, ONE),
        (LOGS, "t", "id-2", 1, 0, Position("t@1", 1, 0, "id-2", 0)),  # partitions of one new log share its generation
        (LOGS, "t", "id-2", 5, 0, Position("t@1", 5, 0, "id-2", 0)),
        (LOGS, "t", "id-3", 0, 0, Position("t@2", 0, 0, "id-3", 0)),
    ],
)
def test_a_known_log_is_read_on_and_an_unknown_one_from_its_beginning(
    known: list[Position], topic: str, topic_id: str, partition: int, first: int, expected: Position
) -> None:
    assert start_position(known, topic, topic_id, partition, first) == expected


def test_a_log_that_was_cut_short_is_a_new_generation_of_its_partition_from_the_divergence_on() -> None:
    known = [Position("t", 0, 7, "id-1"), Position("t", 1, 9, "id-1")]
    cut = new_generation(known, known[0], 4)
    assert (cut.stream, cut.partition, cut.next, cut.published, cut.topic_id) == ("t@1", 0, 4, 4, "id-1")
    later = [*known, Position("t@1", 0, 6, "id-1")]
    assert start_position(later, "t", "id-1", 0, 0).next == 6
    assert start_position(later, "t", "id-1", 1, 0).next == 9
    assert new_generation(later, later[2], 5).stream == "t@2"
    assert new_generation(later, known[1], 5).stream == "t@2", "no name is used twice"


class Seeks:
    """Records the calls of an assignment to a kafka-python consumer."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._subscription = self

    def seek(self, partition: TopicPartition, offset: Any) -> None:
        self.calls.append(("seek", partition.partition, offset))

    def pause(self, *partitions: TopicPartition) -> None:
        self.calls += [("pause", each.partition) for each in partitions]

    def resume(self, *partitions: TopicPartition) -> None:
        self.calls += [("resume", each.partition) for each in partitions]


@pytest.fixture
def assignment() -> Assignment:
    return Assignment(Seeks(), "t")


def reading_of(partition: int, start: int = 0, epoch: int = -1) -> PartitionReader:
    return PartitionReader.of(Claim(Position("t", partition, start, leader_epoch=epoch), 1))


def test_a_partition_is_read_once_it_is_claimed_from_there_and_with_its_epoch(assignment: Assignment) -> None:
    """Only the leader epoch of a seek lets a truncation be seen."""
    assert not assignment.joined
    assignment.on_partitions_assigned([TopicPartition("t", 1), TopicPartition("t", 0)])
    assert assignment.joined and assignment.unclaimed() == [0, 1]
    assert ("pause", 0) in assignment.consumer.calls and ("resume", 0) not in assignment.consumer.calls
    assert assignment.begin(mine := reading_of(0, 7, epoch=3))
    [*_, (_, _, sought), resumed] = assignment.consumer.calls
    assert (sought.offset, sought.leader_epoch, resumed) == (7, 3, ("resume", 0))
    assert (assignment.unclaimed(), assignment.all(), assignment.holds(mine)) == ([1], [mine], True)


def test_what_was_read_before_a_partition_came_back_does_not_hold(assignment: Assignment) -> None:
    partition = TopicPartition("t", 0)
    assignment.on_partitions_assigned([partition])
    assignment.begin(old := reading_of(0))
    assignment.on_partitions_revoked([partition])
    assert not assignment.joined and not assignment.holds(old) and not assignment.begin(old)
    assignment.on_partitions_assigned([partition])
    assert not assignment.holds(old) and assignment.unclaimed() == [0]
    assignment.begin(new := reading_of(0))
    assignment.give_up(old)
    assert assignment.holds(new), "an old reading gives up nothing of a new one"
    assignment.give_up(new)
    assert assignment.unclaimed() == [0] and assignment.consumer.calls[-1] == ("pause", 0)
    assignment.begin(new)
    assignment.on_partitions_lost([partition])
    assert assignment.all() == [] == assignment.unclaimed()
