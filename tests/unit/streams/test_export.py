from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from core.errors import ConfigError
from ratchet_client.records import Sample
from streams.publish.export import export
from streams.store.rows import Position
from streams.store.sample_queries import (
    SampleFilter,
    ValueCounts,
    count_samples,
    newest_samples,
    store_stats,
)
from streams.store.sample_store import SampleStore
from tests.support.datasets import items_of
from tests.support.kafka import picture

WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def sample_row(number: int, **values: Any) -> dict[str, Any]:
    sample = Sample(
        image=picture(number, kind="JPEG" if number % 2 else "PNG"), text=f"Boat {number}, \"red\"\nand 'blue'"
    )
    own = {
        **sample.row(), "kind": "sample", "id": sample.id, "domain": "harbour", "source": f"cam {number % 2}",
        "concept": "boat", "tags": ["a b", "c"], "split": "fresh_eval" if number == 3 else "train", "time": WHEN,
        "ingested_at": WHEN.replace(minute=number), "topic": "t", "partition": 0, "offset": number, "width": 32,
        "height": 32,
    }  # fmt: skip
    return {**own, **values}


ROWS = [sample_row(number) for number in range(4)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SampleStore:
    store = SampleStore(str(tmp_path_factory.mktemp("lake")))
    refused = {
        "kind": "quarantine", "topic": "t", "partition": 0, "offset": 4, "reason": "schema", "source": "cam 1",
        "ingested_at": WHEN, "original": b"{}", "original_headers": "[]",
    }  # fmt: skip
    store.put([*ROWS, refused, {**refused, "offset": 5, "source": "", "reason": "empty"}], [Position("t", 0, 6)])
    return store


@pytest.mark.parametrize("name", ["out", "out.parquet", "out.tar"])
def test_an_export_is_read_again_as_the_same_samples(store: SampleStore, tmp_path: Path, name: str) -> None:
    assert export(store, tmp_path / name) == 4
    found = {item.bytes(): item for item in items_of(tmp_path / name)}
    for row in ROWS:
        item = found[row["image"]]
        for field in ("text", "domain", "source", "concept", "question", "split"):
            assert getattr(item, field) == row[field]
        assert (item.tags, datetime.fromisoformat(item.time)) == (("a b", "c"), WHEN)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert export(store, tmp_path / f"some {name}", SampleFilter(split="fresh_eval")) == 1
    assert [item.bytes() for item in items_of(tmp_path / f"some {name}")] == [ROWS[3]["image"]]
    with pytest.raises(ConfigError, match="there already"):
        export(store, tmp_path / name)


def test_an_export_that_breaks_off_leaves_no_file_of_its_name(store: SampleStore, tmp_path: Path) -> None:
    def fail(rows: Any) -> Any:
        yield next(iter(rows))
        raise KeyboardInterrupt

    for name in ("out.parquet", "out.tar"):
        with pytest.raises(KeyboardInterrupt):
            export(store, tmp_path / name, follow=fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("which", "offsets"),
    [
        (SampleFilter(), [3, 2, 1, 0]),
        (SampleFilter(source="cam 1"), [3, 1]),
        (SampleFilter(text="BOAT 2"), [2]),
        (SampleFilter(text="' OR 1=1 --"), []),
        (SampleFilter(text="%"), []),
        (SampleFilter(domain="harbour", concept="boat", split="train"), [2, 1, 0]),
        (SampleFilter(since=WHEN.replace(minute=2)), [3, 2]),
    ],
)
def test_samples_are_listed_by_filter_newest_first(store: SampleStore, which: SampleFilter, offsets: list[int]) -> None:
    assert [row["offset"] for row in newest_samples(store, which, 10)] == offsets
    assert [row["offset"] for row in newest_samples(store, which, 1)] == offsets[:1]
    assert count_samples(store, which) == len(offsets)


def test_stats_count_samples_and_refusals(store: SampleStore, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = store_stats(store)
    assert (stats.tally["sample"], stats.tally["fresh_eval"], stats.tally["quarantine"]) == (4, 1, 2)
    assert stats.samples["source"].top(5) == [("cam 0", 2), ("cam 1", 2)]
    assert stats.samples["concept"].top(5) == [("boat", 4)]
    assert dict(stats.refusals["source"].top(5)) == {"cam 1": 1, "": 1}
    assert dict(stats.refusals["reason"].top(1)) == {"schema": 1, "(others)": 1}
    monkeypatch.setattr("streams.store.sample_queries.MAX_VALUES", 10)
    counts = ValueCounts()
    for start in range(0, 100, 10):
        counts.add(pa.array(["often"] * 5 + [f"source {start + number}" for number in range(10)]))
    assert counts.top(1) == [("often", 50), ("(others)", 100)], "of too many values the rarest are left out"
    assert len(counts.counts) <= 10
