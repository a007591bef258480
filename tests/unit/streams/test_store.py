"""Readers of the store see samples, positions and counts of one version, however it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lance
import pytest

from core.errors import StoreError, StoreUnavailable
from streams.store.rows import FORMAT, SAMPLE_COLUMNS, Position
from streams.store.sample_store import SampleStore
from tests.support.samples import TOPIC, put, refusal, sample


def test_a_store_that_was_never_written_is_empty_at_version_0(store: SampleStore) -> None:
    assert (store.version(), store.count(), store.offsets(), store.fragments()) == (0, 0, {}, 0)
    assert store.scan().column_names == list(SAMPLE_COLUMNS)
    assert store.scan(version=0).num_rows == store.records().num_rows == store.size() == 0
    assert (store.image([]), store.tally(), store.gaps(), store.refusals(5)) == ({}, {}, [], [])
    assert (store.record(TOPIC, 0, 0), store.refusal(TOPIC, 0, 0), store.pins()) == ([], None, {})
    assert store.outbox(Position(TOPIC, 0, 5), 10) == []


def test_samples_and_offsets_appear_together(store: SampleStore) -> None:
    version = put(store, [sample(0, 1), sample(0, 0)], Position(TOPIC, 0, 2))
    assert store.version() == version
    assert store.offsets() == {"samples:0": 2}
    table = store.scan()
    assert table["offset"].to_pylist() == [0, 1]
    assert table["image"].to_pylist() == [b"samples:0:0", b"samples:0:1"]
    assert table["tags"].to_pylist() == [["a", "b"]] * 2
    assert table["ingested_at"].to_pylist()[0] == sample(0, 0)["ingested_at"]


def test_a_position_comes_back_whole(store: SampleStore) -> None:
    put(store, [sample(0, 0), refusal(0, 1)], Position(TOPIC, 0, 10, "id-1", 9, leader_epoch=4))
    position = store.positions()["samples:0"]
    assert (position.next, position.topic_id, position.published, position.leader_epoch) == (10, "id-1", 9, 4)
    assert position.epoch == 1, "it was claimed once"
    assert position.tally["sample"] == position.tally["quarantine"] == 1


def test_an_old_version_does_not_change(store: SampleStore) -> None:
    old = put(store, [sample(0, 0)], Position(TOPIC, 0, 1))
    put(store, [sample(0, 1)], Position(TOPIC, 0, 2))
    assert (store.count(version=old), store.count()) == (1, 2)
    assert store.offsets(old) == {"samples:0": 1}
    assert store.scan(version=old)["offset"].to_pylist() == [0]


def test_a_pinned_version_outlives_a_cleanup_and_an_unpinned_one_does_not(store: SampleStore) -> None:
    pinned = put(store, [sample(0, 0)], Position(TOPIC, 0, 1))
    store.pin("update-1", pinned)
    other = put(store, [sample(0, 1)], Position(TOPIC, 0, 2))
    put(store, [sample(0, 2)], Position(TOPIC, 0, 3))
    lance.dataset(store.url).cleanup_old_versions(retain_versions=1, error_if_tagged_old_versions=False)
    assert (store.count(version=pinned), store.pins()) == (1, {"update-1": pinned})
    assert store.scan(version=pinned)["offset"].to_pylist() == [0]
    with pytest.raises(StoreError, match=f"no version {other}"):
        store.count(version=other)
    store.pin("update-1", store.version())
    assert store.pins() == {"update-1": store.version()}, "the same name moves"
    for _ in range(2):
        store.unpin("update-1")
    assert store.pins() == {}


def test_after_leaves_out_what_lies_before_the_offsets(store: SampleStore) -> None:
    put(store, [sample(0, n) for n in range(3)], Position(TOPIC, 0, 3))
    before = store.offsets()
    put(store, [sample(0, 3), sample(1, 0)], Position(TOPIC, 0, 4), Position(TOPIC, 1, 1))
    put(store, [sample(0, 0, "samples@1")], Position("samples@1", 0, 1))
    new = store.scan(after=before, columns=["topic", "partition", "offset"]).to_pylist()
    assert [tuple(row.values()) for row in new] == [("samples", 0, 3), ("samples", 1, 0), ("samples@1", 0, 0)]
    assert store.count(after=before) == 3
    assert store.count(after=store.offsets()) == 0


def test_splits_ids_and_columns_select(store: SampleStore) -> None:
    rows = [sample(0, n, split="fresh_eval" if n % 3 == 0 else "train") for n in range(9)]
    put(store, rows, Position(TOPIC, 0, 9))
    assert (store.count(split="train"), store.count(split="fresh_eval")) == (6, 3)
    assert store.scan(split="fresh_eval", columns=["offset"])["offset"].to_pylist() == [0, 3, 6]
    ids = [rows[4]["id"], rows[2]["id"], "f" * 64, "' OR 1=1 --"]
    assert store.scan(ids=ids, columns=["text"]).to_pylist() == [{"text": "text 2"}, {"text": "text 4"}]
    assert store.image(ids[:1]) == {ids[0]: b"samples:0:4"}
    assert store.scan(ids=[], columns=["id"]).num_rows == 0
    assert store.scan(ids=ids[:1], split="fresh_eval", columns=["id"]).num_rows == 0
    with pytest.raises(StoreError, match="no column"):
        store.scan(columns=["kind"])


@pytest.mark.parametrize("split", [None, "train", "fresh_eval"])
@pytest.mark.parametrize("having", [None, "text", "question"])
def test_what_is_counted_by_the_tally_is_what_a_scan_finds(store: SampleStore, split: Any, having: Any) -> None:
    kinds: list[dict[str, Any]] = [{}, {"text": "", "question": "what?", "answer": "that"}, {"question": "which?"}]
    rows = [sample(n % 2, n, split=("train", "fresh_eval")[n % 5 == 0], **kinds[n % 3]) for n in range(30)]
    first = put(store, rows[:11], Position(TOPIC, 0, 11), Position(TOPIC, 1, 11))
    put(store, [*rows[11:], refusal(0, 40)], Position(TOPIC, 0, 41), Position(TOPIC, 1, 30))
    for version in (first, None):
        scanned = store.scan(version, split, having=having, columns=["id"]).num_rows
        assert store.count(version, split, having=having) == scanned
        assert store.count(version, split, having=having, after={"samples:0": 0}) == scanned


def test_refused_and_repeated_records_are_accounted_for_but_are_no_samples(store: SampleStore) -> None:
    rows = [
        sample(0, 0),
        {"kind": "duplicate", "topic": TOPIC, "partition": 0, "offset": 1, "reason": "duplicate_exact"},
        refusal(0, 2),
    ]
    put(store, rows, Position(TOPIC, 0, 3))
    assert store.count() == store.scan().num_rows == 1
    assert store.records()["kind"].to_pylist() == ["sample", "duplicate", "quarantine"]
    assert [row["kind"] for row in store.record(TOPIC, 0, 1)] == ["duplicate"]
    assert store.record(TOPIC, 0, 3) == store.record("other", 0, 1) == []
    refused = store.refusal(TOPIC, 0, 2)
    assert refused is not None and refused["original"] == b"bad"
    assert store.refusal(TOPIC, 0, 0) is None


def test_the_newest_refusals_come_first_and_can_be_chosen_by_reason(store: SampleStore) -> None:
    put(store, [refusal(0, n, reason=("schema", "empty")[n % 2]) for n in range(6)], Position(TOPIC, 0, 6))
    assert [row["offset"] for row in store.refusals(2)] == [5, 4]
    assert [row["offset"] for row in store.refusals(9, "schema")] == [4, 2, 0]
    assert store.refusals(9, "' OR 1=1 --") == []


def test_the_outbox_holds_refused_records_until_they_are_marked_published(store: SampleStore) -> None:
    refused = [refusal(p, n, b"x%d" % n) for p in (0, 1) for n in (5, 2)]
    put(store, refused, Position(TOPIC, 0, 6), Position(TOPIC, 1, 6))
    assert [row["original"] for row in store.outbox(Position(TOPIC, 0, 6), 10)] == [b"x2", b"x5"]
    assert [row["offset"] for row in store.outbox(Position(TOPIC, 0, 6), 1)] == [2], "the oldest first"
    assert [row["offset"] for row in store.outbox(Position(TOPIC, 0, 6, published=3), 10)] == [5]
    assert [row["offset"] for row in store.outbox(Position(TOPIC, 0, 5), 10)] == [2]
    assert store.outbox(Position(TOPIC, 0, 6, published=6), 10) == []


def test_a_gap_is_a_row_with_its_ends_and_its_cause(store: SampleStore) -> None:
    lost = {"kind": "gap", "topic": TOPIC, "partition": 0, "offset": 4, "until": 9, "reason": "retention"}
    put(store, [sample(0, 3), {**lost, "ingested_at": sample(0, 0)["ingested_at"]}], Position(TOPIC, 0, 9))
    [gap] = store.gaps()
    assert (gap["offset"], gap["until"], gap["reason"]) == (4, 9, "retention")
    assert (store.tally()["gap"], store.tally()["gap_offsets"]) == (1, 5)


def test_the_size_is_that_of_the_files_of_the_latest_version(store: SampleStore) -> None:
    put(store, [sample(0, n) for n in range(20)], Position(TOPIC, 0, 20))
    first = store.size()
    put(store, [sample(0, n) for n in range(20, 40)], Position(TOPIC, 0, 40))
    assert 0 < first < store.size()
    on_disk = sum(file.stat().st_size for file in Path(store.url).glob("data/*"))
    assert store.size() <= on_disk  # files of older versions are not counted
    assert store.fragments() == 2, "positions do not count"


def test_a_table_of_another_ratchet_is_not_touched(tmp_path: Path) -> None:
    store = SampleStore(str(tmp_path))
    store.table.create()
    lance.dataset(store.url).update_schema_metadata({"ratchet.format": f"{FORMAT}0"}, replace=True)
    with pytest.raises(StoreError, match="another version of Ratchet"):
        store.positions()


def test_a_store_that_cannot_be_read_is_said_to_be_away_and_not_to_be_empty(store: SampleStore) -> None:
    put(store, [sample(0, 0)], Position(TOPIC, 0, 1))
    for manifest in Path(store.url).glob("_versions/*.manifest"):
        manifest.write_bytes(b"damaged")
    with pytest.raises(StoreUnavailable, match="cannot be read"):
        SampleStore(str(Path(store.url).parent)).offsets()


def test_positions_whose_file_is_gone_are_an_outage_of_the_store(store: SampleStore) -> None:
    put(store, [sample(0, 0)], Position(TOPIC, 0, 1))
    for file in Path(store.url).glob("data/*"):
        file.unlink()
    with pytest.raises(StoreUnavailable, match=r"samples\.lance cannot be read"):
        SampleStore(str(Path(store.url).parent)).offsets()
