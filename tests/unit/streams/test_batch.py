from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kafka import TopicPartition

from core.errors import StoreFull, StoreUnavailable, Superseded
from core.ledger import Ledger
from core.settings.streams import Kafka
from streams.ingest.membership import Assignment, PartitionReader, new_generation, start_position
from streams.ingest.perceptual_hash import SplitRule
from streams.ingest.validate import Accepted
from streams.store import deletion, maintenance
from streams.store.rows import Position
from streams.store.sample_queries import trace
from streams.store.writer import Claim
from tests.support.kafka import good, picture
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
        ([ONE], "t", "", 0, 0, ONE),  # missing information of the broker is not a reason to start over
        ([Position("t", 0, 7, "", 5)], "t", "id-1", 0, 0, ONE),
        (LOGS, "t", "id-2", 1, 0, Position("t@1", 1, 0, "id-2", 0)),  # partitions of one new log share its generation
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


class Consumer:
    """The part of kafka-python's consumer that an assignment calls."""

    def __init__(self) -> None:
        self.paused: set[int] = set()
        self._subscription = SimpleNamespace(seek=lambda *_: None)

    def seek(self, *_: Any) -> None:
        pass

    def pause(self, *partitions: TopicPartition) -> None:
        self.paused |= {each.partition for each in partitions}

    def resume(self, *partitions: TopicPartition) -> None:
        self.paused -= {each.partition for each in partitions}


def test_what_was_read_before_a_partition_came_back_does_not_hold() -> None:
    assignment, partition = Assignment(Consumer(), "t"), TopicPartition("t", 0)
    old, new = (PartitionReader.of(Claim(Position("t", 0, 0), 1)) for _ in range(2))
    assignment.on_partitions_assigned([partition])
    assignment.begin(old)
    assignment.on_partitions_revoked([partition])
    assert not assignment.joined and not assignment.holds(old) and not assignment.begin(old)
    assignment.on_partitions_assigned([partition])
    assert not assignment.holds(old) and assignment.unclaimed() == [0] and assignment.consumer.paused == {0}
    assignment.begin(new)
    assignment.give_up(old)
    assert assignment.holds(new) and not assignment.consumer.paused, "an old reading gives up nothing of a new one"
    assignment.give_up(new)
    assert assignment.unclaimed() == [0] and assignment.consumer.paused == {0}
    assignment.begin(new)
    assignment.on_partitions_lost([partition])
    assert assignment.all() == [] == assignment.unclaimed()


START = 1_767_225_600_000


class Sender(Worker):
    """A worker whose records are pictures with keys, a second apart."""

    def __init__(self, root: Path, partition: int = 0) -> None:
        super().__init__(root, partition, distance=-1, split=SplitRule(b"key", 0.5))

    def read(self, seed: int, key: str | None = "k", at: int | None = None, **fields: str) -> dict[str, Any]:
        headers = [(f"ratchet_{name}", value.encode()) for name, value in {"text": "a", **fields}.items()]
        time = START + 1000 * (self.reading.next if at is None else at)
        result = self.judged(picture(seed), headers, key.encode() if key else None, time)
        assert isinstance(result, Accepted), result
        self.add(result)
        return result.row

    def delete(self, ledger: Ledger, key: str) -> None:
        self.add(self.judged(None, key=key.encode()))
        self.commit()
        deletion.take_tombstones(self.store, ledger)
        deletion.remove(self.store, ledger, ledger.deletions(states=["requested"]))

    def deleted(self) -> list[str]:
        """IDs that an index must forget."""
        return [row["id"] for row in self.store.select("kind = 'deleted' AND id IS NOT NULL", ["id"])]

    def samples(self, *names: str) -> list[tuple[Any, ...]]:
        rows = self.store.scan(columns=["offset", *names]).to_pylist()
        return [tuple(row.values()) for row in rows]


@pytest.fixture
def sender(tmp_path: Path) -> Sender:
    return Sender(tmp_path)


@pytest.fixture(params=[True, False], ids=["in one batch", "in two"])
def between(request: pytest.FixtureRequest, sender: Sender) -> Iterator[Any]:
    return lambda: None if request.param else sender.commit()


def test_a_record_with_a_corrected_label_takes_the_place_of_the_one_before(sender: Sender, between: Any) -> None:
    sender.read(1, label="tram", domain="x")
    between()
    sender.read(1, label="bus", domain="streets")
    sender.read(2)
    outcome = sender.commit()
    assert (outcome.corrected, outcome.duplicates) == (1, {})
    assert sender.samples("label", "domain") == [(1, "bus", "streets"), (2, "", "")]
    tally = sender.store.tally()
    assert (tally["sample"], tally["deleted"], tally["bytes"]) == (2, 1, len(picture(1)) + len(picture(2)))
    assert sender.deleted() == [], "its id is stored as before"
    sender.read(1, label="bus", domain="streets")
    assert sender.commit().duplicates == {"exact": 1}, "the correction again is a duplicate"
    for seed in (3, 4, 5):
        sender.read(seed, key="chain", replaces="key")
        between()
    sender.commit()
    gone = sender.store.select("kind = 'deleted' AND offset > 3", ["offset", "detail"])
    assert sorted((row["offset"], row["detail"]) for row in gone) == [(4, "by t:0:5"), (5, "by t:0:6")]


@pytest.mark.parametrize("by", ["key", "id"])
def test_a_corrected_text_replaces_what_its_header_names(sender: Sender, between: Any, by: str) -> None:
    tram = sender.read(1, text="a tram")["id"]
    sender.read(2, key="other")
    between()
    sender.read(1, text="a bus", replaces="key" if by == "key" else tram)
    assert sender.commit().corrected == 1
    assert sender.samples("text", "extra") == [(1, "a", ""), (2, "a bus", "")]
    assert sender.deleted() == [tram]
    [first] = trace(sender.store, ("t", 0, 0))
    assert (first.outcome, first.reason, first.detail) == ("deleted", "corrected", "by t:0:2")


@pytest.mark.parametrize("fields", [{"label": "bus"}, {"text": "a bus", "replaces": "key"}], ids=["label", "text"])
def test_what_was_sent_before_the_correction_does_not_come_back(
    sender: Sender, tmp_path: Path, fields: dict[str, str]
) -> None:
    sender.read(1)
    sender.read(1, **fields)
    sender.commit()
    kept = sender.samples("text", "label")
    sender.read(1, at=0)  # a log that is read again from its beginning
    sender.read(1, at=1, **fields)
    outcome = sender.commit()
    assert (outcome.corrected, outcome.samples.total(), outcome.duplicates.total()) == (0, 0, 2)
    sender.follow_anew(tmp_path / "again.db")
    sender.read(1, at=0)
    assert sender.commit().samples.total() == 0, "an index that is made again knows of it"
    assert sender.samples("text", "label") == kept
    sender.read(1, at=99)
    assert sender.commit().samples.total() == 1, "what is sent later is meant so"


def test_the_newest_of_two_corrections_wins_and_samples_stay_on_their_side(sender: Sender) -> None:
    for seed in range(12):
        sender.read(seed, key=f"k{seed}", at=0, label="a")
    sender.commit()
    before = dict(sender.samples("split"))
    assert set(before.values()) == {"train", "fresh_eval"}
    for at, label in ((9, "newest"), (5, "older")):
        for seed in range(12):
            sender.read(seed, key=f"k{seed}", at=at, label=label)
    outcome = sender.commit()
    assert (outcome.corrected, outcome.duplicates) == (12, {"older": 12})
    assert sender.samples("label", "split") == [(12 + n, "newest", before[n]) for n in range(12)]
    for seed in range(12):
        sender.read(seed, key=f"k{seed}", text="other words", replaces="key")
    sender.commit()
    assert sender.samples("text", "split") == [(36 + n, "other words", before[n]) for n in range(12)]


def test_a_worker_with_another_index_sees_a_correction_and_keeps_it(tmp_path: Path) -> None:
    first, second = Sender(tmp_path, 0), Sender(tmp_path, 1)
    first.read(1, label="tram")
    first.commit()
    second.read(1, label="tram", at=0)
    assert second.commit().duplicates == {"exact": 1}
    first.read(1, label="bus")
    first.read(2)
    first.commit()
    maintenance.compact(first.store, expunge=True)
    second.read(1, label="tram", at=0)
    second.read(2, at=0)
    assert second.commit().samples.total() == 0
    assert first.samples("label") == [(1, "bus"), (2, "")], "it is no double of what it replaced"
    assert second.index.settled() == []


@pytest.mark.parametrize("stored", [False, True], ids=["before the commit", "after the commit"])
def test_a_correction_that_a_crash_interrupts_is_made_once(sender: Sender, tmp_path: Path, stored: bool) -> None:
    sender.read(1, label="tram")
    sender.commit()
    sender.read(1, label="bus")
    commit = sender.writer._commit

    def die(*given: Any) -> int:
        if stored:
            commit(*given)
        raise LookupError

    sender.writer._commit = die  # type: ignore[method-assign]
    with pytest.raises(LookupError):
        sender.commit()
    assert sender.samples("label") == ([(1, "bus")] if stored else [(0, "tram")])
    again = Sender(tmp_path)
    assert again.reading.next == (2 if stored else 1)
    again.read(1, label="bus")
    outcome = again.commit()
    assert (outcome.duplicates, outcome.corrected) == (({"exact": 1}, 0) if stored else ({}, 1))
    assert again.samples("label") == [(1, "bus")]


@pytest.mark.parametrize("order", [("first", "second", "third"), ("third", "second", "first")])
def test_a_sample_stays_until_all_who_sent_it_have_deleted_it(
    sender: Sender, ledger: Ledger, order: tuple[str, ...]
) -> None:
    for key in ("first", "second", "third"):
        sender.read(1, key=key, label=f"of {key}", source=key)
    sender.read(2, key="other")
    sender.commit()
    before = dict(sender.samples("split"))
    left = ["first", "second", "third"]
    for key in order:
        sender.delete(ledger, key)
        left.remove(key)
        samples = [row for row in sender.samples("label", "source", "split", "image") if row[1] != ""]
        offset = ["first", "second", "third"].index(left[0]) if left else None
        assert samples == ([(offset, f"of {left[0]}", left[0], before[0], picture(1))] if left else [])
        assert sender.store.tally()["sample"] == 1 + bool(left)
        assert len(sender.deleted()) == (not left), "nobody is to forget what stays"
        sender.read(1, key="later", label="of later")
        assert sender.commit().samples.total() == (not left), "it is known for as long as it is there"
        sender.delete(ledger, "later")
    assert sorted(row.samples for row in ledger.deletions()) == [0, 0, 0, 0, 1, 1]


def test_a_deletion_by_id_or_of_all_senders_leaves_nothing(sender: Sender, ledger: Ledger) -> None:
    first, _ = (sender.read(1, key=key, source="crawler") for key in ("first", "second"))
    sender.read(2, key="first", source="crawler")
    sender.commit()
    for selector in ({"id": first["id"]}, {"source": "crawler"}):
        asked = deletion.request_deletion(ledger, selector, actor="ann", reason="asked to")
        deletion.remove(sender.store, ledger, [asked])
    assert (sender.samples(), sender.store.count_rows("kind IN ('sample', 'duplicate')")) == ([], 0)


def test_what_another_sent_too_stays_when_it_is_corrected(sender: Sender, between: Any, tmp_path: Path) -> None:
    sender.read(1, label="of k")
    sender.read(1, key="other", label="of other")
    between()
    sender.read(1, text="other words", replaces="key")
    sender.commit()
    assert sender.samples("text", "label") == [(1, "a", "of other"), (2, "other words", "")]
    sender.read(1, key="other", label="of other")
    assert sender.commit().samples.total() == 0
    sender.follow_anew(tmp_path / "again.db")
    sender.read(1, key="other", label="of other")
    assert sender.commit().samples.total() == 0


def test_who_sent_a_sample_second_and_corrects_it_holds_on_to_it_no_more(
    sender: Sender, ledger: Ledger, between: Any
) -> None:
    sender.read(1, label="of k")
    sender.read(1, key="other")
    between()
    sender.read(1, key="other", text="other words", replaces="key")
    outcome = sender.commit()
    assert (outcome.corrected, sender.samples("text")) == (1, [(0, "a"), (2, "other words")])
    sender.read(1, key="third")
    assert sender.commit().duplicates == {"exact": 1}, "the first one's sample is there"
    sender.delete(ledger, "third")
    sender.delete(ledger, "k")
    assert sender.samples("text") == [(2, "other words")]
