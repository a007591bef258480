"""What became of a record is told by its position, and by its sample's id."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from core.errors import RecordError, StoreUnavailable
from streams.store.rows import Position
from streams.store.sample_queries import MAX_RECEIPTS, RecordQuery, trace
from streams.store.sample_store import SampleStore

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
def store(tmp_path: Path) -> SampleStore:
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
def test_each_position_has_one_outcome(store: SampleStore, offset: int, outcome: str) -> None:
    [receipt] = trace(store, RecordQuery.parse(f"t:0:{offset}"))
    assert (receipt.outcome, receipt.position) == (outcome, f"t:0:{offset}")


def test_a_receipt_says_why_and_when(store: SampleStore) -> None:
    [refused] = trace(store, RecordQuery("t", 0, 3))
    assert refused.as_json() == {
        "stream": "t", "partition": 0, "offset": 3, "position": "t:0:3", "outcome": "refused", "reason": "schema",
        "detail": "field 'x'", "time": "2026-01-01T00:00:03+00:00",
    }  # fmt: skip
    [stored] = trace(store, RecordQuery("t", 0, 0))
    assert (stored.id, stored.split, stored.source) == (A, "train", "cam")
    [deleted] = trace(store, RecordQuery("t", 0, 9))
    assert (deleted.reason, deleted.detail, deleted.id) == ("tombstone", "wish of t:0:4", C)


def test_a_partition_that_nobody_reads_is_not_read_yet(store: SampleStore, tmp_path: Path) -> None:
    empty = SampleStore(str(tmp_path / "none"))
    for asked, where in ((store, "t:7:0"), (store, "other:0:0"), (empty, "t:0:0")):
        assert [each.outcome for each in trace(asked, RecordQuery.parse(where))] == ["not_read_yet"]


def test_an_id_finds_the_sample_and_all_that_repeats_it(store: SampleStore) -> None:
    for text in (A, A[:8]):
        assert [(each.offset, each.outcome) for each in trace(store, text)] == [
            (0, "stored"), (1, "duplicate"), (2, "duplicate"), (4, "tombstone"),
        ]  # fmt: skip
    [twin] = trace(store, B)
    assert (twin.outcome, twin.duplicate_of) == ("duplicate", A)
    assert trace(store, "d" * 64) == []


def test_receipts_of_an_id_are_bounded(tmp_path: Path) -> None:
    rows = [row("duplicate", offset, id=A, duplicate_of=A) for offset in range(MAX_RECEIPTS + 5)]
    assert len(trace(filled(tmp_path, rows, Position("t", 0, len(rows))), A)) == MAX_RECEIPTS


def test_a_topic_that_was_made_anew_has_receipts_of_both_logs_newest_first(tmp_path: Path) -> None:
    rows = [row("sample", 0, id=A), row("sample", 0, "t@1", id=B), row("sample", 1, id=C)]
    store = filled(tmp_path, rows, Position("t", 0, 9), Position("t@1", 0, 1))
    assert [(r.stream, r.id) for r in trace(store, RecordQuery("t", 0, 0))] == [("t@1", B), ("t", A)]
    assert [r.id for r in trace(store, RecordQuery("t@1", 0, 0))] == [B]
    assert [r.stream for r in trace(store, RecordQuery("t", 0, 1))] == ["t"]
    assert [(r.stream, r.outcome) for r in trace(store, RecordQuery("t", 0, 2))] == [("t@1", "not_read_yet")]


@pytest.mark.parametrize("text", ["", "t", "t:0", "t:-1:0", "t:0:x", f"t:0:{'9' * 30}", "' OR 1=1:0", "a:b:0:0"])
def test_what_is_no_position_is_refused(text: str) -> None:
    with pytest.raises(RecordError, match="topic:partition:offset"):
        RecordQuery.parse(text)


@pytest.mark.parametrize("text", ["", "aaaaaaa", "A" * 64, "a" * 65, "' OR 1=1"])
def test_what_is_no_id_is_refused(store: SampleStore, text: str) -> None:
    with pytest.raises(RecordError, match="no id of a sample"):
        trace(store, text)


def test_a_quote_in_a_topic_is_no_sql(store: SampleStore) -> None:
    [receipt] = trace(store, RecordQuery("t' OR '1'='1", 0, 0))
    assert receipt.outcome == "not_read_yet"


def test_a_store_that_cannot_be_read_says_so(store: SampleStore, tmp_path: Path) -> None:
    store.positions()
    for file in (tmp_path / "lake").rglob("*.lance"):
        if file.is_file():
            file.unlink()
    with pytest.raises(StoreUnavailable):
        trace(SampleStore(str(tmp_path / "lake")), RecordQuery("t", 0, 0))
