from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest
from prometheus_client import REGISTRY

from core.errors import StoreError
from core.settings.serving import Catalog as CatalogSettings
from serving.catalog import index_files, index_maintainer, space_indexes
from serving.catalog.index_maintainer import IndexMaintainer, recall_of
from serving.catalog.memory_index import (
    CODINGS,
    LEVELS,
    IndexTooLarge,
    Level,
    MemoryIndex,
    choose_coding,
    estimated_bytes,
)
from serving.catalog.queries import Filters, as_filters
from serving.catalog.row_columns import digests_of, keys_of
from serving.catalog.tables import COMPACT_EVERY, Tables
from tests.support.disk import holds

DIM, ROWS, FEW = 16, 600, 256
SETTINGS = CatalogSettings(min_recall=0.8)
SPACE = "aaaa"
EASY = Level(1, 10)


def names(start: int, count: int) -> list[str]:
    return [hashlib.sha256(str(n).encode()).hexdigest() for n in range(start, start + count)]


def vectors(start: int, count: int) -> np.ndarray:
    drawn = np.stack([np.random.default_rng(n).normal(size=DIM) for n in range(start, start + count)])
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def rows_of(start: int, count: int, text: str = "text") -> pa.Table:
    numbers = range(start, start + count)
    times = [datetime(2024, 1, 1, tzinfo=UTC) + timedelta(days=n % 28) for n in numbers]
    return pa.table(
        {
            "id": names(start, count), "domain": [f"d{n % 5}" for n in numbers], "source": ["s"] * count,
            "time": pa.array(times, pa.timestamp("us", "UTC")), "text": [f"{text} {n}" for n in numbers],
            "concept": [f"c{n % 3}" for n in numbers], "label": [None] * count,
            "tags": [[f"t{n % 4}", f"ü{n % 7}"] if n % 2 else None for n in numbers],
        }
    )  # fmt: skip


def add(tables: Tables, start: int, count: int, text: str = "text", space: str = SPACE) -> None:
    tables.merge(space, rows_of(start, count, text), vectors(start, count))


def maintainer_of(tables: Tables, settings: CatalogSettings = SETTINGS, *spaces: str) -> IndexMaintainer:
    resident = dict.fromkeys(spaces or (SPACE,), True)
    return IndexMaintainer(tables, settings, lambda: resident, lambda space, count: names(0, ROWS)[:: ROWS // count])


async def settle(maintainer: IndexMaintainer) -> None:
    while await maintainer.step():
        pass


def nearest(tables: Tables, number: int, filters: Filters | None = None) -> str:
    return tables.search(SPACE, vectors(number, 1), 1, filters or Filters())[0][0].text


def index_of(tables: Tables) -> MemoryIndex:
    index = tables.indexes.of(SPACE).index
    assert index is not None
    return index


def value(name: str) -> float | None:
    return REGISTRY.get_sample_value(f"ratchet_catalog_{name}")


@pytest.fixture(autouse=True)
def small_tables_have_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_maintainer, "INDEX_ROWS", FEW)


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    tables = Tables(str(tmp_path / "lake"), tmp_path / "index")
    add(tables, 0, ROWS)
    return tables


@pytest.fixture
def restarted(tmp_path: Path) -> Callable[[], Tables]:
    return lambda: Tables(str(tmp_path / "lake"), tmp_path / "index")


@pytest.fixture
async def maintained(tables: Tables) -> IndexMaintainer:
    """The maintainer of tables that have their index."""
    made = maintainer_of(tables)
    await settle(made)
    return made


async def test_an_index_of_enough_rows_and_recall_is_used(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    small = maintainer_of(tables)
    monkeypatch.setattr(index_maintainer, "INDEX_ROWS", 1000)
    await settle(small)
    assert small.is_ready(SPACE, ROWS) and value("recall_ratio") == 1.0
    assert tables.indexes.of(SPACE).index is None and tables.indexes.usable(SPACE) is None
    monkeypatch.setattr(index_maintainer, "INDEX_ROWS", FEW)
    maintainer = maintainer_of(tables)
    assert not maintainer.is_ready(SPACE, ROWS)
    await settle(maintainer)
    assert maintainer.is_ready(SPACE, ROWS)
    status = maintainer.status(SPACE)
    assert (status["rows"], status["used"], status["coding"]) == (ROWS, True, "16 bits")
    assert status["recall"] >= SETTINGS.min_recall
    assert value("recall_ratio") == status["recall"] and value("index_used") == 1
    assert value("indexed_rows") == ROWS and value("index_bytes") == status["bytes"] > 0
    [hits] = tables.search(SPACE, vectors(7, 1), 3, Filters())
    [exact] = tables._search_exactly(SPACE, vectors(7, 1), 3, Filters())
    assert hits[0].score == pytest.approx(1.0, abs=1e-3)
    assert replace(hits[0], score=1.0) == replace(exact[0], score=1.0)


async def test_rows_that_another_catalog_adds_and_removes_are_followed(
    tables: Tables, maintained: IndexMaintainer, restarted: Callable[[], Tables]
) -> None:
    other = restarted()
    add(other, ROWS, 50)
    await settle(maintained)
    assert index_of(tables).rows == ROWS + 50 and nearest(tables, ROWS + 3) == f"text {ROWS + 3}"
    add(other, ROWS + 50, 1)
    assert tables.present(SPACE, names(ROWS + 50, 2)) == set(names(ROWS + 50, 1))
    assert nearest(tables, ROWS + 50) == f"text {ROWS + 50}", "who asks for it finds it"
    for number in (3, 4):
        other.remove(SPACE, names(number, 1))
        await settle(maintained)
        assert index_of(tables).rows == ROWS + 50 and nearest(tables, number) != f"text {number}"
        add(other, ROWS + 48 + number, 1)


async def test_searches_and_changes_go_on_beside_a_build(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    build, during = space_indexes.build_index, list[str]()

    def build_beside_changes(dataset: lance.LanceDataset, most_bytes: float) -> MemoryIndex:
        index = build(dataset, most_bytes)
        at = index.rows
        for number in range(COMPACT_EVERY + 1):
            add(tables, at + number, 1)
        tables.remove(SPACE, names(5, 1))
        add(tables, 5, 1, "again")
        during.append(nearest(tables, at + 3))
        during.append(nearest(tables, 5))
        return index

    monkeypatch.setattr(space_indexes, "build_index", build_beside_changes)
    maintainer = maintainer_of(tables)
    await maintainer.step()  # the first index: searches are exact meanwhile
    assert during == [f"text {ROWS + 3}", "again 5"]
    first, rows = index_of(tables), ROWS + COMPACT_EVERY + 1
    assert first.rows == rows and nearest(tables, ROWS + 3) == f"text {ROWS + 3}"
    tables.indexes.build(SPACE, 2**30)  # another one: they go to the old one
    assert during[2:] == [f"text {rows + 3}", "again 5"]
    assert index_of(tables) is not first and index_of(tables).rows == tables.rows(SPACE)
    assert nearest(tables, 5) == "again 5"


@pytest.mark.usefixtures("maintained")
async def test_searches_beside_changes_answer_correctly(tables: Tables) -> None:
    wrong, ended = list[str](), threading.Event()

    def search() -> None:
        while not ended.is_set():
            for number in range(100, 130):
                if (text := nearest(tables, number)) != f"text {number}":
                    wrong.append(text)

    callers = [threading.Thread(target=search) for _ in range(3)]
    for caller in callers:
        caller.start()
    for number in range(5):
        add(tables, ROWS + 200 * number, 200)
        tables.remove(SPACE, names(ROWS + 200 * number, 100))
    ended.set()
    for caller in callers:
        caller.join()
    assert wrong == [] and index_of(tables).rows == ROWS + 500


async def test_an_index_that_is_too_bad_or_small_is_made_anew(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_maintainer, "LEVELS", (EASY,))
    maintainer = maintainer_of(tables, CatalogSettings(min_recall=0.99))
    await settle(maintainer)
    status = maintainer.status(SPACE)
    assert status["recall"] < 0.99 and not status["used"] and status["rows"] == ROWS
    assert value("recall_ratio") == status["recall"] and value("index_used") == 0
    [exact] = tables.nearest(SPACE, vectors(1000, 1), 10, Filters())
    scores = [hit.score for hit in tables.search(SPACE, vectors(1000, 1), 10, Filters())[0]]
    assert scores == pytest.approx(exact.scores.tolist(), abs=1e-5)
    assert maintainer.is_ready(SPACE, ROWS)
    monkeypatch.setattr(index_maintainer, "LEVELS", LEVELS)
    before = index_of(tables)
    add(tables, ROWS, ROWS // 5)
    await settle(maintainer)
    second = index_of(tables)
    assert second is not before and maintainer.status(SPACE)["used"]
    monkeypatch.setattr(index_maintainer, "GROWTH", 1.5)
    add(tables, 2 * ROWS, ROWS // 4)
    await settle(maintainer)
    assert index_of(tables) is second
    add(tables, 3 * ROWS, ROWS // 2)
    await settle(maintainer)
    assert index_of(tables) is not second and index_of(tables).partitions.nlist > second.partitions.nlist
    assert nearest(tables, 3 * ROWS + 5) == f"text {3 * ROWS + 5}"


@pytest.mark.usefixtures("maintained")
async def test_filters_find_what_meets_them_in_the_index(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    query = vectors(2000, 1)
    day = datetime(2024, 1, 4, tzinfo=UTC)
    for few in (True, False):
        monkeypatch.setattr("serving.catalog.memory_index.FEW_ROWS", 1024 if few else 0)
        index_of(tables)._masks.clear()
        for filters in (
            as_filters(domain=["d3"]), as_filters(domain=["d1", "d2"], source=["s"]),
            as_filters(since=day, until=day + timedelta(days=9)),
        ):  # fmt: skip
            [exact] = tables.nearest(SPACE, query, 10, filters)
            [hits] = tables.search(SPACE, query, 10, filters)
            for hit in hits:
                assert (not filters.domain or hit.domain in filters.domain) and hit.time is not None
                assert filters.since is None or filters.since <= hit.time < filters.until
            right = sum(hit.score >= exact.scores[-1] - 1e-3 for hit in hits)
            assert right == 10 if few else right >= 8
        assert tables.search(SPACE, query, 10, as_filters(domain=["none"])) == [[]]
        for filters in (as_filters(tags=["t1", "ü6"]), as_filters(concepts=["c1"], tags=["ü3", "none"])):
            [exact] = tables.nearest(SPACE, query, 10, filters)
            [hits] = tables.search(SPACE, query, 10, filters)
            recall = recall_of(keys_of(digests_of([hit.id for hit in hits])), exact)
            assert recall == 1 if few else recall >= 0.8
        assert tables.search(SPACE, query, 10, as_filters(labels=["cat"])) == [[]]
    add(tables, ROWS + 3, 1)  # d3
    assert nearest(tables, ROWS + 3, as_filters(domain=["d3"])) == f"text {ROWS + 3}"


@pytest.mark.usefixtures("maintained")
async def test_rows_that_are_removed_are_not_found_and_their_bytes_go_everywhere(
    tables: Tables, tmp_path: Path, restarted: Callable[[], Tables]
) -> None:
    digest = bytes.fromhex(names(7, 1)[0])
    assert holds(tmp_path / "index", digest), "the index is kept on the disk"
    index = index_of(tables)
    [position] = index.columns.positions(np.asarray([int.from_bytes(digest[:8], "big")], np.uint64))
    code = index.finer.sa_encode(vectors(7, 1)).tobytes()  # type: ignore[union-attr]
    assert holds(tmp_path / "index", code)
    tables.remove(SPACE, names(7, 1))
    assert not holds(tmp_path / "index", digest) and not holds(tmp_path / "index", code)
    tables.expunge(SPACE, timedelta(0))
    tables.expunge(SPACE, timedelta(0))
    assert nearest(tables, 7) != "text 7" and nearest(tables, 8) == "text 8"
    assert tables.rows(SPACE) == index.rows == ROWS - 1
    tables.indexes.save(SPACE)
    assert holds(tmp_path / "index", bytes.fromhex(names(8, 1)[0]))
    assert not holds(tmp_path, digest) and not holds(tmp_path, names(7, 1)[0].encode())
    assert not holds(tmp_path / "index", code)
    assert not index.finer.reconstruct_batch(np.asarray([position])).any() or index.coding.bits != 16  # type: ignore[union-attr]
    again = restarted()
    await settle(maintainer_of(again))
    assert nearest(again, 7) != "text 7" and index_of(again).rows == ROWS - 1


@pytest.mark.usefixtures("maintained")
async def test_no_code_of_a_removed_row_is_left_behind_the_end_of_its_list(tables: Tables) -> None:
    import faiss

    tables.remove(SPACE, names(0, ROWS // 2))
    partitions = index_of(tables).partitions
    lists = faiss.downcast_InvertedLists(partitions.invlists)
    free = 0
    for number in range(partitions.nlist):
        rows = lists.list_size(number)
        blocks = -(-rows // lists.n_per_block)
        if blocks:
            codes = faiss.rev_swig_ptr(lists.get_codes(number), blocks * lists.block_size).reshape(blocks, -1)
            for slot in range(rows, blocks * lists.n_per_block):
                assert not lists.packer.unpack_1(codes, slot).any()
                free += 1
    assert free


async def test_an_index_that_was_kept_is_taken_at_the_next_start(
    tables: Tables, maintained: IndexMaintainer, tmp_path: Path, restarted: Callable[[], Tables],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert maintained.status(SPACE)["saved"]
    writer = Tables(tables.url, tmp_path / "elsewhere")  # of another machine, while this one does not run
    add(writer, ROWS, 30)
    writer.remove(SPACE, names(9, 2))
    monkeypatch.setattr(space_indexes, "build_index", None)  # is not called
    again = restarted()
    later = maintainer_of(again)
    await settle(later)
    assert later.status(SPACE)["used"] and index_of(again).rows == ROWS + 28
    assert nearest(again, ROWS + 3) == f"text {ROWS + 3}" and nearest(again, 9) != "text 9"
    assert nearest(again, 30, as_filters(domain=["d0"])) == "text 30"


@pytest.mark.usefixtures("maintained")
@pytest.mark.parametrize("damage", ["cut", "changed", "of another version"])
async def test_a_damaged_file_is_made_anew(
    tmp_path: Path, restarted: Callable[[], Tables], damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [path] = (tmp_path / "index").rglob("*.index")
    content = path.read_bytes()
    middle = len(content) // 2
    changed = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    path.write_bytes({"cut": content[:middle], "changed": changed}.get(damage, content))
    if damage == "of another version":
        monkeypatch.setattr(index_files, "FORMAT", -1)
    again = restarted()
    maintainer = maintainer_of(again)
    await settle(maintainer)
    assert maintainer.status(SPACE)["used"] and index_of(again).rows == ROWS
    assert maintainer.status(SPACE)["build_seconds"] > 0
    assert nearest(again, 17) == "text 17"


async def test_the_memory_of_an_index_decides_how_vectors_are_coded_and_whether_there_is_one(tables: Tables) -> None:
    text_bytes = 8.0
    sizes = [estimated_bytes(ROWS, DIM, text_bytes, coding) for coding in CODINGS]
    assert sizes == sorted(sizes, reverse=True)
    for coding, size in zip(CODINGS, sizes, strict=True):
        assert choose_coding(ROWS, DIM, text_bytes, size) == coding
        settings = CatalogSettings(min_recall=0.01, cache_gib=2 * (size + 300) / 2**30)
        maintainer = maintainer_of(tables, settings)
        tables.indexes.forget(SPACE, files=True)
        await settle(maintainer)
        status = maintainer.status(SPACE)
        assert status["coding"] == coding.name and status["used"]
        assert status["bytes"] <= size + 300
        assert nearest(tables, 3, as_filters(domain=["d3"])).startswith("text ")
    with pytest.raises(IndexTooLarge, match="cache_gib"):
        choose_coding(ROWS, DIM, text_bytes, sizes[-1] - 1)
    maintainer = maintainer_of(tables, CatalogSettings(cache_gib=1e-5))
    await settle(maintainer)
    status = maintainer.status(SPACE)
    assert not status["used"] and "catalog.cache_gib" in status["trouble"] and maintainer.is_ready(SPACE, ROWS)
    assert nearest(tables, 7) == "text 7", "searches are exact"


async def test_a_space_that_is_dropped_leaves_no_index(
    tables: Tables, maintained: IndexMaintainer, restarted: Callable[[], Tables], tmp_path: Path
) -> None:
    restarted().drop(SPACE)
    await settle(maintained)
    assert tables.indexes.usable(SPACE) is None and maintained.status(SPACE)["rows"] == 0
    assert not holds(tmp_path / "index", bytes.fromhex(names(1, 1)[0]))


async def test_an_index_that_cannot_be_changed_is_made_again(
    tables: Tables, maintained: IndexMaintainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match="dimension"):
        tables.search(SPACE, vectors(0, 1)[:, :8], 1, Filters())
    monkeypatch.setattr(index_of(tables).columns, "write", None)
    add(tables, ROWS, 1)
    assert tables.indexes.usable(SPACE) is None and not list((tmp_path / "index").rglob("*.faiss"))
    assert nearest(tables, ROWS) == f"text {ROWS}", "exactly"
    await settle(maintained)
    assert maintained.status(SPACE)["used"] and nearest(tables, ROWS) == f"text {ROWS}"
