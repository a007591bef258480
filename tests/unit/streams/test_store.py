from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lance
import pytest

from core.errors import RecordError, StoreError, StoreUnavailable
from streams.store.rows import FORMAT, SAMPLE_COLUMNS, Position, read_position
from streams.store.sample_queries import trace
from streams.store.sample_store import SampleStore
from tests.support.samples import TOPIC, put, refusal, sample


def test_a_store_that_was_never_written_is_empty_at_version_0(store: SampleStore) -> None:
    assert (store.version(), store.count(), store.offsets(), store.fragments()) == (0, 0, {}, 0)
    assert store.scan().column_names == list(SAMPLE_COLUMNS)
    assert store.scan(version=0).num_rows == store.records().num_rows == store.size() == 0
    assert (store.image([]), store.tally(), store.gaps(), store.quarantined(5)) == ({}, {}, [], [])
    assert (store.quarantined_record(TOPIC, 0, 0), store.pins()) == (None, {})
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


@pytest.mark.parametrize(
    "choose",
    [
        lambda store, after: store.count(after=after),
        lambda store, after: len(store.scan(after=after)),
        lambda store, after: sum(map(len, store.addresses(["id"], after=after))),
    ],
    ids=["count", "scan", "addresses"],
)
def test_what_is_stored_while_samples_are_chosen_is_chosen_whole_or_not_at_all(
    store: SampleStore, monkeypatch: pytest.MonkeyPatch, choose: Callable[[SampleStore, dict[str, int]], int]
) -> None:
    put(store, [sample(0, 0)], Position(TOPIC, 0, 1))
    read = store.positions

    def stored_meanwhile(version: int | None = None) -> dict[str, Position]:
        known = read(version)
        put(store, [sample(0, 1), sample(1, 0)], Position(TOPIC, 0, 2), Position(TOPIC, 1, 1))
        return known

    monkeypatch.setattr(store, "positions", stored_meanwhile)
    assert choose(store, {"samples:0": 0}) == 1


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


def test_a_split_name_cannot_escape_its_quotes(store: SampleStore) -> None:
    put(store, [sample(0, 0)], Position(TOPIC, 0, 1))
    assert store.scan(split="x' OR 'a' = 'a").num_rows == 0
    assert store.count(split="x' OR 'a' = 'a", after={"samples:0": 0}) == 0
    assert store.count(split="x' OR 'a' = 'a") == 0


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
    refused = store.quarantined_record(TOPIC, 0, 2)
    assert refused is not None and refused["original"] == b"bad"
    assert store.quarantined_record(TOPIC, 0, 0) is None


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


A, B, C = "a" * 64, "ab" * 32, "c" * 64


def row(kind: str, offset: int, stream: str = "t", **values: Any) -> dict[str, Any]:
    own = {"kind": kind, "topic": stream, "partition": 0, "offset": offset}
    if kind == "sample":
        own |= {"image": b"x", "text": "a boat", "split": "train"}
    return {"ingested_at": datetime(2026, 1, 1, 0, 0, offset % 60, tzinfo=UTC), **own, **values}


ROWS = [
    row("sample", 0, id=A, source="cam"),
    row("duplicate", 1, id=A, reason="duplicate_exact", duplicate_of=A),
    row("duplicate", 2, id=B, reason="duplicate_perceptual", duplicate_of=A),
    row("quarantine", 3, reason="schema", detail="field 'x'", original=b"{}", original_headers="[]"),
    row("tombstone", 4, id=A),
    row("gap", 5, until=8, reason="retention", detail="3 offsets"),
    row("deleted", 9, id=C, reason="tombstone", detail="wish of t:0:4"),
]


@pytest.fixture
def told(tmp_path: Path) -> SampleStore:
    return filled(tmp_path, ROWS, Position("t", 0, 12))


def filled(path: Path, rows: Sequence[dict[str, Any]], *ends: Position) -> SampleStore:
    store = SampleStore(str(path / "lake"))
    store.put(rows, ends)
    return store


@pytest.mark.parametrize(
    ("offset", "outcome"),
    [
        (0, "stored"), (1, "duplicate"), (3, "refused"), (4, "tombstone"), (5, "lost"), (7, "lost"), (8, "no_record"),
        (9, "deleted"), (11, "no_record"), (12, "not_read_yet"), (10**18 - 1, "not_read_yet"),
    ],
)  # fmt: skip
def test_each_position_has_one_outcome(told: SampleStore, offset: int, outcome: str) -> None:
    [receipt] = trace(told, read_position(f"t:0:{offset}"))
    assert (receipt.outcome, receipt.position) == (outcome, f"t:0:{offset}")


def test_a_receipt_says_why_and_when(told: SampleStore) -> None:
    [refused] = trace(told, ("t", 0, 3))
    assert refused.as_json() == {
        "stream": "t", "partition": 0, "offset": 3, "position": "t:0:3", "outcome": "refused", "reason": "schema",
        "detail": "field 'x'", "time": "2026-01-01T00:00:03+00:00",
    }  # fmt: skip
    [stored] = trace(told, ("t", 0, 0))
    assert (stored.id, stored.split, stored.source) == (A, "train", "cam")
    [deleted] = trace(told, ("t", 0, 9))
    assert (deleted.reason, deleted.detail, deleted.id) == ("tombstone", "wish of t:0:4", C)


def test_a_partition_that_nobody_reads_is_not_read_yet(told: SampleStore, tmp_path: Path) -> None:
    empty = SampleStore(str(tmp_path / "none"))
    for asked, where in ((told, "t:7:0"), (told, "other:0:0"), (empty, "t:0:0")):
        assert [each.outcome for each in trace(asked, read_position(where))] == ["not_read_yet"]


def test_a_quote_in_a_topic_is_no_sql(told: SampleStore) -> None:
    [receipt] = trace(told, ("t' OR '1'='1", 0, 0))
    assert receipt.outcome == "not_read_yet"


def test_an_id_finds_the_sample_and_all_that_repeats_it(told: SampleStore) -> None:
    for text in (A, A[:8]):
        assert [(each.offset, each.outcome) for each in trace(told, text)] == [
            (0, "stored"), (1, "duplicate"), (2, "duplicate"), (4, "tombstone"),
        ]  # fmt: skip
    [twin] = trace(told, B)
    assert (twin.outcome, twin.duplicate_of) == ("duplicate", A)
    assert trace(told, "d" * 64) == []


def test_a_topic_that_was_made_anew_has_receipts_of_both_logs_newest_first(tmp_path: Path) -> None:
    rows = [row("sample", 0, id=A), row("sample", 0, "t@1", id=B), row("sample", 1, id=C)]
    store = filled(tmp_path, rows, Position("t", 0, 9), Position("t@1", 0, 1))
    assert [(r.stream, r.id) for r in trace(store, ("t", 0, 0))] == [("t@1", B), ("t", A)]
    assert [r.id for r in trace(store, ("t@1", 0, 0))] == [B]
    assert [r.stream for r in trace(store, ("t", 0, 1))] == ["t"]
    assert [(r.stream, r.outcome) for r in trace(store, ("t", 0, 2))] == [("t@1", "not_read_yet")]


@pytest.mark.parametrize("text", ["", "t", "t:0", "t:-1:0", "t:0:x", f"t:0:{'9' * 30}", "' OR 1=1:0", "a:b:0:0"])
def test_what_is_no_position_is_refused(text: str) -> None:
    with pytest.raises(RecordError, match="topic:partition:offset"):
        read_position(text)


@pytest.mark.parametrize("text", ["", "aaaaaaa", "A" * 64, "a" * 65, "' OR 1=1"])
def test_what_is_no_id_is_refused(told: SampleStore, text: str) -> None:
    with pytest.raises(RecordError, match="no id of a sample"):
        trace(told, text)
