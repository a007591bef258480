"""A batch stores each of its records once, with the offsets behind them, and only under its own claim."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.errors import StoreUnavailable, Superseded
from core.settings.streams import Ingest, Kafka
from streams.ingest.batch import Batch, CommitResult
from streams.ingest.duplicates import DuplicateIndex
from streams.ingest.membership import PartitionReader, start_position
from streams.ingest.validate import Accepted, Received, Rules, StoreRow, validate
from streams.store.sample_store import SampleStore
from streams.store.writer import StoreWriter
from tests.support.kafka import good

RULES = Rules(Ingest())
POISON = -1


class Reader:
    """A partition as one process sees it."""

    def __init__(self, lake: Path, kafka: Kafka | None = None, file: Path | str = ":memory:") -> None:
        self.store = SampleStore(str(lake))
        writer = StoreWriter(self.store.table)
        self.batch = Batch(kafka or Kafka(), writer, DuplicateIndex(file, self.store.table.identity()[0]))
        start = start_position(self.store.positions().values(), "t", "id-1", 0, 0)
        [claim] = writer.claim([start])
        self.reading = PartitionReader(claim, claim.position.next)

    def result(self, seed: int) -> Accepted | StoreRow:
        value, headers = (b"poison", []) if seed == POISON else good(seed)
        return validate(Received(self.reading.stream, 0, self.reading.next, value, None, headers), RULES)

    def take(self, *seeds: int) -> None:
        for seed in seeds:
            self.reading.next += 1
            self.batch.add(self.reading, self.reading.next, self._at(seed), 100)

    def _at(self, seed: int) -> Accepted | StoreRow:
        self.reading.next -= 1
        try:
            return self.result(seed)
        finally:
            self.reading.next += 1

    def commit(self, unpublished: int | None = None) -> CommitResult:
        return self.batch.commit(lambda reading: unpublished)

    def rows(self) -> list[tuple[int, str]]:
        table = self.store.records().to_pylist()
        return [(row["offset"], row["kind"]) for row in table]


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return Reader(tmp_path)


def test_what_is_no_longer_ours_is_not_stored(reader: Reader) -> None:
    reader.take(1, 2)
    reader.batch.drop(lambda reading: False)
    outcome = reader.commit()
    assert (outcome.readings, outcome.version, len(reader.batch)) == ([], 0, 0)
    assert (reader.store.count(), reader.store.offsets()) == (0, {"t:0": 0})


def test_a_process_that_slept_cannot_store_what_another_stored_meanwhile(tmp_path: Path) -> None:
    sleeper = Reader(tmp_path)
    sleeper.take(1, 2, 3)
    other = Reader(tmp_path)
    other.take(1, 2, 3)
    other.commit()
    with pytest.raises(Superseded, match="t:0"):
        sleeper.commit()
    assert len(sleeper.batch) == 3, "which partition is lost is the consumer's to say"
    assert other.rows() == [(0, "sample"), (1, "sample"), (2, "sample")]
    assert Reader(tmp_path).reading.next == 3


def test_duplicates_are_found_in_the_batch_and_in_the_store_and_by_the_next_process(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    reader.take(1, 1, 2)
    assert reader.commit().duplicates == {"exact": 1}
    reader.take(2, 3)
    assert reader.commit().duplicates == {"exact": 1}
    again = Reader(tmp_path)
    again.take(1, 2, 3, 4)
    outcome = again.commit()
    assert (outcome.duplicates, outcome.samples.total()) == ({"exact": 3}, 1)
    assert again.store.count() == again.store.scan(columns=["id"]).num_rows == 4
    of = {row["duplicate_of"] for row in again.store.records().to_pylist()}
    assert of - {None} == {each.row["id"] for each in map(again.result, (1, 2, 3)) if isinstance(each, Accepted)}


def test_the_position_the_tally_and_the_rows_are_in_step(reader: Reader) -> None:
    reader.take(1, 1, POISON, 2)
    reader.reading.leader_epoch = 7
    outcome = reader.commit()
    position = reader.store.positions()["t:0"]
    assert (position.next, position.published, position.leader_epoch) == (4, 2, 7)
    assert reader.reading.stored == 4 and outcome.version == reader.store.version()
    assert {name: position.tally[name] for name in ("sample", "duplicate", "quarantine")} == {
        "sample": 2, "duplicate": 1, "quarantine": 1,
    }  # fmt: skip
    assert (outcome.records, outcome.size, len(outcome.of_kind("quarantine"))) == (4, 400, 1)


@pytest.mark.parametrize(("unpublished", "expected"), [(None, 4), (1, 1), (9, 4)])
def test_published_goes_as_far_as_the_publisher_has_come(
    reader: Reader, unpublished: int | None, expected: int
) -> None:
    reader.take(1, 2, 3, 4)
    reader.commit(unpublished)
    assert reader.store.positions()["t:0"].published == expected


def test_a_batch_is_bounded_by_bytes_records_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(tmp_path, Kafka(batch_records=3, batch_seconds=100))
    assert not reader.batch.due and reader.batch.seconds_left == float("inf")
    reader.take(1, 2)
    assert not reader.batch.due and 90 < reader.batch.seconds_left <= 100
    reader.take(3)
    assert reader.batch.due
    monkeypatch.setattr("streams.ingest.batch.BATCH_BYTES", 1024)
    large = Reader(tmp_path, Kafka(batch_seconds=100))
    large.take(*range(10))
    assert not large.batch.due
    large.take(10)
    assert large.batch.due
    hasty = Reader(tmp_path, Kafka(batch_seconds=1e-9))
    assert not hasty.batch.due
    hasty.take(1)
    assert hasty.batch.due


def test_a_store_that_is_away_leaves_the_batch_and_the_index_as_they_were(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader.take(1, POISON, 2)

    def away(*args: Any) -> int:
        raise StoreUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(reader.batch.writer, "commit", away)
        for _ in range(2):
            with pytest.raises(StoreUnavailable):
                reader.commit()
    assert (len(reader.batch), len(reader.batch.index)) == (3, 0)
    assert reader.commit().duplicates == {}
    assert reader.rows() == [(0, "sample"), (1, "quarantine"), (2, "sample")]


def test_a_valid_sample_that_the_table_cannot_hold_is_refused_and_its_neighbours_are_stored(reader: Reader) -> None:
    reader.take(1)
    for fields in ({"text": "\ud83d"}, {"width": 2**31}, {"tags": 7}):
        bad = reader.result(2)
        assert isinstance(bad, Accepted)
        reader.reading.next += 1
        reader.batch.add(reader.reading, reader.reading.next, replace(bad, row={**bad.row, **fields}), 100)
    reader.take(2, 3)
    outcome = reader.commit()
    refused = outcome.of_kind("quarantine")
    assert [(row["offset"], row["reason"]) for row in refused] == [(1, "internal"), (2, "internal"), (3, "internal")]
    assert {row["original"] for row in refused} == {good(2)[0]}
    assert reader.rows() == list(enumerate(["sample", *["quarantine"] * 3, "sample", "sample"]))
    assert outcome.duplicates == {}, "a refused sample is nobody's original"
