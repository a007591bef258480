"""The approximate index of a space, on real LanceDB: made, extended, measured, and not used where it finds little."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from prometheus_client import REGISTRY

from ops.settings import Catalog as CatalogSettings
from serving.catalog import index_keeper
from serving.catalog.index_keeper import IndexKeeper
from serving.catalog.index_process import IndexProcess
from serving.catalog.queries import Filters, as_filters
from serving.catalog.tables import COMPACT_EVERY, Tables
from serving.catalog.vector_index import Effort

DIM, ROWS = 16, 600
SETTINGS = CatalogSettings(index_rows=256, min_recall=0.8)
SPACE = "aaaa"


def names(start: int, count: int) -> list[str]:
    return [hashlib.sha256(str(n).encode()).hexdigest() for n in range(start, start + count)]


def vectors(start: int, count: int) -> np.ndarray:
    drawn = np.stack([np.random.default_rng(n).normal(size=DIM) for n in range(start, start + count)])
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def add(tables: Tables, start: int, count: int) -> None:
    numbers = range(start, start + count)
    rows = pa.table(
        {
            "id": names(start, count), "domain": [f"d{n % 5}" for n in numbers], "source": ["s"] * count,
            "time": pa.array([datetime(2024, 1, 1, tzinfo=UTC)] * count, pa.timestamp("us", "UTC")),
            "text": [f"text {n}" for n in numbers],
        }
    )  # fmt: skip
    tables.merge(SPACE, rows, vectors(start, count))


def keeper_of(tables: Tables, settings: CatalogSettings = SETTINGS) -> IndexKeeper:
    return IndexKeeper(tables, settings, lambda: {SPACE: True}, lambda space, count: names(0, ROWS)[:: ROWS // count])


async def settle(keeper: IndexKeeper) -> None:
    while await keeper.step():
        pass


def value(name: str) -> float | None:
    return REGISTRY.get_sample_value(f"ratchet_catalog_{name}")


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    tables = Tables(str(tmp_path))
    add(tables, 0, ROWS)
    return tables


async def test_an_index_is_made_of_enough_rows_and_used_when_its_recall_is_enough(tables: Tables) -> None:
    keeper = keeper_of(tables)
    assert not keeper.is_ready(SPACE, ROWS)
    await settle(keeper)
    assert keeper.is_ready(SPACE, ROWS)
    status = keeper.status(SPACE)
    assert (status["rows"], status["unindexed"], status["used"]) == (ROWS, 0, True)
    assert status["recall"] >= SETTINGS.min_recall
    assert value("recall_ratio") == status["recall"] and value("index_used") == 1
    hits = tables.search(SPACE, vectors(7, 1)[0], 3, Filters())
    assert (hits[0].text, len(hits)) == ("text 7", 3)


async def test_an_index_is_made_while_rows_come_in(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a backfill: so many rows that a merge would rewrite the files that the index is being made of."""
    create = lance.LanceDataset.create_index

    def create_beside_merges(self: lance.LanceDataset, *args: Any, **options: Any) -> Any:
        for number in range(COMPACT_EVERY + 1):
            add(tables, ROWS + number, 1)
        return create(self, *args, **options)

    monkeypatch.setattr(lance.LanceDataset, "create_index", create_beside_merges)
    keeper = keeper_of(tables)
    await keeper.step()
    assert keeper.status(SPACE)["rows"] == ROWS
    before = tables.fragments(SPACE)
    add(tables, 2 * ROWS, 1)
    assert tables.fragments(SPACE) < before  # what was put off


async def test_a_small_space_has_no_index_and_is_ready_at_once(tables: Tables) -> None:
    keeper = keeper_of(tables, CatalogSettings(index_rows=1000))
    assert keeper.is_ready(SPACE, ROWS)
    await settle(keeper)
    assert not tables.index_state(SPACE).exists and tables.effort(SPACE) is None
    assert value("recall_ratio") == 1.0


async def test_what_came_after_the_index_was_made_is_found_at_once_and_indexed_later(
    tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = keeper_of(tables)
    await settle(keeper)
    add(tables, ROWS, 50)
    assert tables.search(SPACE, vectors(ROWS + 3, 1)[0], 1, Filters())[0].text == f"text {ROWS + 3}"
    await settle(keeper)
    assert tables.index_state(SPACE).unindexed == 50
    monkeypatch.setattr(index_keeper, "TAIL_ROWS", 40)
    await settle(keeper)
    state = tables.index_state(SPACE)
    assert (state.rows, state.unindexed) == (ROWS + 50, 0)
    assert tables.search(SPACE, vectors(ROWS + 3, 1)[0], 1, Filters())[0].text == f"text {ROWS + 3}"


async def test_an_index_that_finds_too_little_is_not_used_until_it_is_made_anew(
    tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_keeper, "EFFORTS", (Effort(1, 1),))
    keeper = keeper_of(tables, CatalogSettings(index_rows=256, min_recall=0.99))
    await settle(keeper)
    status = keeper.status(SPACE)
    assert status["recall"] < 0.99 and not status["used"] and status["rows"] == ROWS
    assert value("recall_ratio") == status["recall"] and value("index_used") == 0
    exact = tables.exact_scores(SPACE, vectors(1000, 1), 10, Filters())[0]
    scores = [hit.score for hit in tables.search(SPACE, vectors(1000, 1)[0], 10, Filters())]
    assert scores == pytest.approx(exact.tolist(), abs=1e-5)
    assert keeper.is_ready(SPACE, ROWS)
    monkeypatch.undo()
    add(tables, ROWS, ROWS // 5)
    before = keeper.status(SPACE)["build_seconds"]
    await settle(keeper)
    assert keeper.status(SPACE)["build_seconds"] != before and keeper.status(SPACE)["used"]


async def test_filters_find_all_that_meets_them_through_the_index(tables: Tables) -> None:
    await settle(keeper_of(tables))
    query = vectors(2000, 1)
    for filters in (as_filters(domain=["d3"]), as_filters(domain=["d1", "d2"], source=["s"])):
        exact = tables.exact_scores(SPACE, query, 10, filters)[0]
        hits = tables.search(SPACE, query[0], 10, filters)
        assert {hit.domain for hit in hits} <= set(filters.domain)
        assert sum(hit.score >= exact[-1] - 1e-5 for hit in hits) >= 8
    assert tables.search(SPACE, query[0], 10, as_filters(domain=["none"])) == []


async def test_rows_that_are_removed_are_not_found_and_their_bytes_go(tables: Tables, tmp_path: Path) -> None:
    keeper = keeper_of(tables)
    await settle(keeper)
    from datetime import timedelta

    tables.remove(SPACE, names(7, 1))
    tables.expunge(SPACE, timedelta(0))
    tables.expunge(SPACE, timedelta(0))
    assert tables.search(SPACE, vectors(7, 1)[0], 1, Filters())[0].text != "text 7"
    assert tables.search(SPACE, vectors(8, 1)[0], 1, Filters())[0].text == "text 8"
    assert tables.index_state(SPACE).rows == ROWS - 1
    held = [path for path in tmp_path.rglob("*") if path.is_file() and names(7, 1)[0].encode() in path.read_bytes()]
    assert held == []


async def test_queries_of_clients_count_for_recall(tables: Tables) -> None:
    keeper = keeper_of(tables)
    keeper.recent.add(SPACE, vectors(5000, 1)[0])
    [plain, _] = keeper._questions(SPACE)
    assert len(plain.vectors) == 41 and np.allclose(plain.vectors[-1], vectors(5000, 1)[0])


def test_an_index_is_made_by_a_process_of_its_own(tables: Tables) -> None:
    IndexProcess(tables.url)(SPACE, "build")
    assert tables.index_state(SPACE).indexed == ROWS
