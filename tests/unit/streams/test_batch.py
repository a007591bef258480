"""Twins are found, splits are fixed by the picture, and a batch stores only what is still its own."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from streams.quality.judge import Accepted, Received, Refused, judge
from streams.quality.split import split_of

from ops.settings import Ingest, Kafka
from streams.assignment import Cursor, next_generation, open_cursor
from streams.batch import Batch, Superseded
from streams.images import decode_image
from streams.quality.duplicates import Looks, StoredLooks, phash
from streams.rows import Position, Snapshot
from streams.store import SampleStore
from tests.support.kafka import good, picture

WORDS = ("a boat", "", "")
LIMITS = Ingest()


def test_the_same_content_is_an_exact_twin_whatever_it_looks_like() -> None:
    looks = Looks()
    looks.add("ab" * 32, "00ff" * 4, WORDS)
    twin = looks.twin("ab" * 32, "1234" * 4, ("other", "", ""))
    assert twin is not None and (twin.kind, twin.id) == ("exact", "ab" * 32)


@pytest.mark.parametrize(("distance", "found"), [(0, False), (2, False), (3, True)])
def test_near_twins_are_within_the_distance(distance: int, found: bool) -> None:
    looks = Looks(distance)
    looks.add("ab" * 32, "0000000000000000", WORDS)
    assert (looks.twin("cd" * 32, "0000000000000007", WORDS) is not None) == found


def test_other_words_are_never_a_perceptual_twin() -> None:
    looks = Looks(16)
    looks.add("ab" * 32, "0" * 16, WORDS)
    assert looks.twin("cd" * 32, "0" * 16, ("a boat", "what?", "a boat")) is None
    assert looks.twin("cd" * 32, "0" * 16, WORDS) is not None


def test_the_hash_survives_another_encoding_and_size() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (2, 12, 12), np.uint8)
    one, other = (Image.fromarray(each).resize((96, 96), Image.Resampling.BICUBIC).convert("RGB") for each in noise)
    small = one.resize((48, 48), Image.Resampling.LANCZOS)
    jpeg = io.BytesIO()
    one.save(jpeg, "JPEG", quality=70)
    assert bits(one, small) <= 4
    assert bits(one, decode_image(jpeg.getvalue())) <= 4
    assert bits(one, other) > 12


def bits(one: Image.Image, other: Image.Image) -> int:
    """Bits in which the hashes of two images differ."""
    return (int(phash(one), 16) ^ int(phash(other), 16)).bit_count()


def test_the_split_is_a_function_of_the_picture_with_the_given_share() -> None:
    pictures = [b"picture %d" % n for n in range(4000)]
    splits = [split_of(each, 0.15) for each in pictures]
    assert splits == [split_of(each, 0.15) for each in pictures]
    share = splits.count("fresh_eval") / len(splits)
    assert 0.13 < share < 0.17  # 3.5 standard deviations
    held_out = {each for each, split in zip(pictures, splits, strict=True) if split == "fresh_eval"}
    assert held_out <= {each for each in pictures if split_of(each, 0.3) == "fresh_eval"}
    assert {split_of(each, 0.0) for each in pictures} == {"train"}


def test_one_picture_with_two_texts_is_in_one_split() -> None:
    rows = []
    for text in ("one", "two"):
        judged = judge(received(0, (picture(1), [("ratchet_text", text.encode())])), LIMITS)
        assert isinstance(judged, Accepted)
        rows.append(judged.row)
    assert rows[0]["split"] == rows[1]["split"]
    assert rows[0]["id"] != rows[1]["id"]


def test_a_fault_of_ours_refuses_the_record_and_does_not_stop_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.quality.judge.phash", lambda image: 1 / 0)
    judged = judge(received(3, good(1)), LIMITS)
    assert isinstance(judged, Refused)
    assert (judged.reason, judged.row["offset"], judged.row["original"]) == ("internal", 3, picture(1))


def received(offset: int, message: tuple[bytes | None, list[tuple[str, bytes]]], stream: str = "t") -> Received:
    return Received(stream, 0, offset, message[0], None, message[1])


class Reader:
    """A partition as one process sees it."""

    def __init__(self, lake: Path, kafka: Kafka | None = None) -> None:
        self.store = SampleStore(str(lake))
        self.batch = Batch(kafka or Kafka(), StoredLooks(self.store))
        self.cursor = open_cursor(self.store.snapshot(), "t", "id-1", 0)

    def take(self, *seeds: int) -> None:
        for seed in seeds:
            self.batch.add(self.cursor, judge(received(self.cursor.next, good(seed)), LIMITS), 100)
            self.cursor.next += 1


def test_what_is_no_longer_ours_is_not_stored(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    reader.take(1, 2)
    assert reader.batch.commit(reader.store, lambda cursor: False).cursors == []
    assert (reader.store.count(), len(reader.batch)) == (0, 0)


def test_a_process_that_slept_cannot_store_what_another_stored_meanwhile(tmp_path: Path) -> None:
    sleeper, other = Reader(tmp_path), Reader(tmp_path)
    for reader in (sleeper, other):
        reader.take(1, 2, 3)
    other.batch.commit(other.store, lambda cursor: True)
    with pytest.raises(Superseded, match="t:0"):
        sleeper.batch.commit(sleeper.store, lambda cursor: True)
    assert sleeper.store.records()["offset"].to_pylist() == [0, 1, 2]
    late = Reader(tmp_path)
    assert late.cursor.next == 3


def test_twins_are_found_in_the_batch_in_the_store_and_after_a_compaction(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    reader.take(1, 1, 2)
    assert reader.batch.commit(reader.store, lambda cursor: True).duplicates == {"exact": 1}
    reader.take(2, 3)
    assert reader.batch.commit(reader.store, lambda cursor: True).duplicates == {"exact": 1}
    reader.store.compact()
    again = Reader(tmp_path)
    again.take(1, 2, 3, 4)
    outcome = again.batch.commit(again.store, lambda cursor: True)
    assert (outcome.duplicates, outcome.samples.total()) == ({"exact": 3}, 1)
    assert again.store.count() == 4


def test_a_batch_is_bounded_by_bytes_records_and_time(tmp_path: Path) -> None:
    reader = Reader(tmp_path, Kafka(batch_bytes=1024, batch_records=3, batch_seconds=100))
    assert reader.batch.fits(10**9) and not reader.batch.due
    reader.take(1, 2)
    assert reader.batch.fits(824) and not reader.batch.fits(825) and not reader.batch.due
    reader.take(3)
    assert reader.batch.due
    hasty = Reader(tmp_path, Kafka(batch_seconds=1e-9))
    assert not hasty.batch.due
    hasty.take(1)
    assert hasty.batch.due


def positions(*known: Position) -> Snapshot:
    return Snapshot(1, {each.key: each for each in known})


def test_a_known_log_is_read_on_and_an_unknown_one_from_its_beginning() -> None:
    old = Position("t", 0, 7, "id-1", 5)
    on = open_cursor(positions(old), "t", "id-1", 0)
    assert (on.stream, on.stored, on.published, on.next) == ("t", 7, 5, 7)
    anew = open_cursor(positions(old), "t", "id-2", 0)
    assert (anew.stream, anew.stored, anew.next) == ("t@1", None, 0)
    first = open_cursor(positions(), "t", "id-1", 0)
    assert (first.stream, first.stored) == ("t", None)


def test_partitions_of_one_new_log_share_its_generation() -> None:
    known = positions(Position("t", 0, 7, "id-1"), Position("t", 1, 9, "id-1"), Position("t@1", 0, 2, "id-2"))
    assert open_cursor(known, "t", "id-2", 1).stream == "t@1"
    assert open_cursor(known, "t", "id-2", 5).stream == "t@1"
    assert open_cursor(known, "t", "id-3", 0).stream == "t@2"


def test_a_log_that_was_cut_short_is_a_new_generation_of_its_partition() -> None:
    known = positions(Position("t", 0, 7, "id-1"), Position("t", 1, 9, "id-1"))
    cut = next_generation(Cursor("t", 0, "id-1", 7), known)
    assert (cut.stream, cut.stored, cut.partition) == ("t@1", None, 0)
    later = positions(*known.positions.values(), Position("t@1", 0, 3, "id-1"))
    assert open_cursor(later, "t", "id-1", 0).stored == 3
    assert open_cursor(later, "t", "id-1", 1).stored == 9
