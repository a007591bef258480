"""Of held-out samples the gate chooses by their words, and reads the images of those that it asks."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from core.errors import GateError
from core.ledger import UpdateRow
from core.settings import Settings
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.unit.gate.builders import picture
from updater.gate.sample_suites import PAGE, TEXT_COLUMNS, HeldOut
from updater.service.gate_update import update_suites

LEARNED, FRESH, LIMIT = 420, 300, 50
VERSION_TIME = datetime(2026, 1, 1, tzinfo=UTC)


class RecordingStore(SampleStore):
    """Counts how often the image of each row is read."""

    def __init__(self, lake: str) -> None:
        super().__init__(lake)
        self.read: Counter[str] = Counter()

    def rows_at(
        self, addresses: Sequence[int], columns: Sequence[str], version: int | None = None
    ) -> list[dict[str, Any]]:
        rows = super().rows_at(addresses, list(dict.fromkeys([*columns, "id"])), version)
        if "image" in columns:
            self.read.update(row["id"] for row in rows)
        return rows

    def scan(self, *args: Any, **values: Any) -> Any:
        assert "image" not in (values.get("columns") or ["image"])
        return super().scan(*args, **values)

    def addresses(self, columns: Sequence[str], *args: Any, **values: Any) -> Any:
        assert "image" not in columns
        return super().addresses(columns, *args, **values)


def _row(offset: int, family: str) -> dict[str, Any]:
    words = {"text": f"thing {offset}", "question": "", "answer": ""}
    if family == "vlm":
        words = {"text": "", "question": f"what is {offset}?", "answer": "it"}
    return {
        "kind": "sample", "id": f"{offset:064x}", "image": picture(offset), **words, "label": "", "concept": "",
        "domain": ("flags", "shop", "common")[min(offset % 20, 2) if offset >= LEARNED else 0], "split": "fresh_eval",
        "ingested_at": VERSION_TIME, "look": None, "words": 0, "topic": "samples", "partition": 0, "offset": offset,
    }  # fmt: skip


@pytest.fixture(params=["clip", "vlm"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def store(tmp_path: Path, family: str) -> RecordingStore:
    made = RecordingStore(str(tmp_path / "lake"))
    rows = [_row(offset, family) for offset in range(LEARNED + FRESH)]
    made.put(rows, [Position("samples", 0, LEARNED + FRESH)])
    return made


def _update(family: str, version: int, begin: int) -> UpdateRow:
    return UpdateRow(
        id="u", family=family, state="trained", recipe={}, seed=0, store_version=version,
        data_from={"samples:0": begin}, data_to={}, incumbent=None, adapter=None,
        cost={}, error=None, created_at=VERSION_TIME, updated_at=VERSION_TIME,
    )  # fmt: skip


def test_images_of_samples_that_are_not_asked_are_not_read(store: RecordingStore, family: str, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", gate={"max_items": LIMIT, "min_items": 10})  # type: ignore[arg-type]
    suites, fresh = update_suites(settings, store, _update(family, store.version(), begin=LEARNED))
    memory = [suite for suite in suites if suite.name.startswith("memory")]
    assert [(suite.name, len(suite.items())) for suite in memory] == [("memory.flags", 400 if family == "vlm" else 420)]
    assert [(suite.name, len(suite.items())) for suite in fresh] == [
        ("fresh.common", LIMIT), ("fresh.flags", 15), ("fresh.shop", 15),
    ]  # fmt: skip
    if family == "clip":
        assert not store.read, "captions are units; nothing is known of images before they are asked"
    asked = {item.sample_id for suite in (*memory, *fresh) for item in suite.items()}
    for suite in (*memory, *fresh):
        assert len(suite.digest()) == 64
        assert [item.read() for item in suite.items()] == [picture(int(i.sample_id, 16)) for i in suite.items()]
    assert set(store.read) == asked


def test_neighbours_are_read_together_and_by_several_threads(store: RecordingStore, family: str) -> None:
    held_out = HeldOut(store, store.version(), "text" if family == "clip" else "question")
    ids = held_out.rows(TEXT_COLUMNS)["id"].to_pylist()[: 4 * PAGE]
    held_out.expect(ids)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(held_out, ids)) == [picture(int(each, 16)) for each in ids]
    assert set(store.read) == set(ids) and set(store.read.values()) == {1}


def test_a_store_that_cannot_be_read_is_no_verdict(store: RecordingStore, family: str) -> None:
    held_out = HeldOut(store, store.version(), "text" if family == "clip" else "question")
    first = held_out.rows(["id", "domain"])["id"][0].as_py()
    shutil.rmtree(store.url)
    with pytest.raises(GateError, match="images of held-out samples"):
        held_out(first)


def test_without_rows_there_is_a_table_without_rows(tmp_path: Path) -> None:
    held_out = HeldOut(SampleStore(str(tmp_path / "lake")), 0, "text")
    assert held_out.rows(TEXT_COLUMNS).num_rows == 0 and held_out.rows(TEXT_COLUMNS).column_names == list(TEXT_COLUMNS)
