"""Tables, filters and the reconcile loop, on real tables and a real sample store."""

from __future__ import annotations

import asyncio
import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from core.errors import RecordError, StoreError
from serving.catalog.catalog import Catalog, repeat
from serving.catalog.embedding import CHUNK_ROWS
from serving.catalog.queries import Filters, as_filters
from serving.catalog.tables import Tables
from serving.releases.types import ReleaseSnapshot
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from streams.store.writer import StoreWriter
from tests.support.disk import holds
from tests.support.waiting import until

DIM = 8
HERE = ReleaseSnapshot(1, None, "aaaa", "t")
THERE = ReleaseSnapshot(2, "clip-x", "bbbb", "t")


def vector(seed: int) -> np.ndarray:
    made = np.random.default_rng(seed).normal(size=DIM).astype(np.float32)
    return made / np.linalg.norm(made)


def rows(start: int, count: int, **extra: Any) -> list[dict[str, Any]]:
    return [
        {
            "kind": "sample", "id": hashlib.sha256(str(n).encode()).hexdigest(), "image": str(n).encode(),
            "text": f"text {n}", "question": "", "answer": "", "domain": "even" if n % 2 == 0 else "odd",
            "source": "o'test", "time": datetime(2024, 1, 1 + n % 28, tzinfo=UTC), "ingested_at": datetime.now(UTC),
            "split": "train", "tags": [], "topic": "t", "partition": 0, "offset": n, **extra,
        }
        for n in range(start, start + count)
    ]  # fmt: skip


def put(store: SampleStore, new: list[dict[str, Any]], end: int) -> None:
    store.put(new, [Position("t", 0, end)])


def pixels(data: bytes) -> np.ndarray:
    if data == b"13":
        raise RecordError("image_undecodable", "unlucky")
    return np.full((2, 2, 3), int(data) % 256, np.uint8)


class Encoder:
    """Vectors that depend on image and adapter; counts calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, str | None]] = []
        self.gate: asyncio.Event | None = None

    async def __call__(self, batch: np.ndarray, clip: str | None) -> np.ndarray:
        self.calls.append((len(batch), clip))
        if self.gate is not None:
            await self.gate.wait()
        return np.stack([vector(int(image[0, 0, 0]) + (1000 if clip else 0)) for image in batch])


@pytest.fixture
def encoder() -> Encoder:
    return Encoder()


@pytest.fixture
def catalog(tmp_path: Path, store: SampleStore, encoder: Encoder) -> Catalog:
    return Catalog(Tables(str(tmp_path / "catalog")), store, pixels, encoder)


async def settle(catalog: Catalog) -> None:
    while await catalog.reconciler.step():
        pass


def stored(tables: Tables, space: str) -> set[str]:
    return {sample for batch in tables.id_batches(space) for sample in batch}


async def test_every_row_is_in_every_resident_space(catalog: Catalog, store: SampleStore, encoder: Encoder) -> None:
    put(store, rows(0, CHUNK_ROWS + 5), CHUNK_ROWS + 5)
    await catalog.adopt([THERE, HERE])
    await settle(catalog)
    for snapshot in (HERE, THERE):
        assert len(stored(catalog.tables, snapshot.image_space)) == CHUNK_ROWS + 4  # one image cannot be read
    assert catalog.status()["coverage"] == 1.0
    put(store, rows(50, 1), 51)
    await settle(catalog)
    assert set(encoder.calls[-2:]) == {(1, "clip-x"), (1, None)}  # only what is new; both spaces at once


async def test_cover_returns_when_the_space_is_complete(catalog: Catalog, store: SampleStore) -> None:
    put(store, rows(0, 10), 10)
    running = asyncio.create_task(catalog.run())
    assert await asyncio.wait_for(catalog.cover(HERE), 20) == 10
    hits = await catalog.search("aaaa", vector(3), 1, Filters())
    assert (hits[0].text, round(hits[0].score, 4)) == ("text 3", 1.0)
    running.cancel()


async def test_retire_drops_what_no_release_needs(catalog: Catalog, store: SampleStore) -> None:
    put(store, rows(0, 4), 4)
    await catalog.adopt([THERE, HERE])
    await settle(catalog)
    assert await catalog.retire([THERE], spare={"aaaa"}) == [], "of a proposed release"
    assert await catalog.retire([THERE]) == ["aaaa"]
    assert catalog.tables.spaces() == ["bbbb"]
    with pytest.raises(StoreError, match="no index"):
        await catalog.search("aaaa", vector(0), 1, Filters())


async def test_a_space_that_was_retired_in_the_middle_of_a_batch_is_made_anew_when_it_comes_back(
    catalog: Catalog, store: SampleStore, encoder: Encoder
) -> None:
    put(store, rows(0, 6), 6)
    await catalog.adopt([HERE])
    encoder.gate = asyncio.Event()
    stepping = asyncio.create_task(catalog.reconciler.step())
    await until(lambda: encoder.calls)
    await catalog.retire([])
    encoder.gate.set()
    await stepping
    await catalog.adopt([HERE])
    await settle(catalog)
    assert len(stored(catalog.tables, "aaaa")) == 6


@pytest.mark.parametrize("event", ["others are retired", "the table is made anew"])
async def test_a_space_that_a_release_waits_for_stays(
    catalog: Catalog, store: SampleStore, encoder: Encoder, event: str
) -> None:
    put(store, rows(0, 6), 6)
    encoder.gate = asyncio.Event()
    running = asyncio.create_task(catalog.run())
    covering = asyncio.create_task(catalog.cover(THERE))
    await until(lambda: encoder.calls)
    if event == "others are retired":
        await catalog.retire([])  # was ordered before the release was proposed, and comes late
    else:
        catalog.reconciler.reopen("bbbb")
    encoder.gate.set()
    assert await asyncio.wait_for(covering, 20) == 6
    assert await catalog.retire([]) == ["bbbb"]
    running.cancel()


async def test_a_loop_that_is_woken_as_it_is_ended_ends() -> None:
    idle, woken = asyncio.Event(), asyncio.Event()

    async def step() -> bool:
        idle.set()
        return False

    running = asyncio.create_task(repeat(step, woken, 60))
    await idle.wait()
    await asyncio.sleep(0)  # it waits now
    woken.set()
    await asyncio.sleep(0)  # asyncio.wait_for would take the cancellation for the end of its wait
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asyncio.shield(running), 20)


async def test_filters_are_conditions_and_not_code(catalog: Catalog, store: SampleStore) -> None:
    put(store, rows(0, 12), 12)
    await catalog.adopt([HERE])
    await settle(catalog)

    async def texts(filters: Filters) -> set[str]:
        return {hit.text for hit in await catalog.search("aaaa", vector(0), 100, filters)}

    assert await texts(as_filters(domain=["even"])) == {f"text {n}" for n in range(0, 12, 2)}
    assert len(await texts(as_filters(source=["o'test"]))) == 12
    assert await texts(as_filters(source=["' OR 1=1 --"])) == set()
    since, until = datetime(2024, 1, 3, tzinfo=UTC), datetime(2024, 1, 5)
    assert await texts(as_filters(since=since, until=until)) == {"text 2", "text 3"}


def test_an_empty_space_finds_nothing_and_another_dimension_is_an_error(tmp_path: Path) -> None:
    tables = Tables(str(tmp_path / "c"))
    assert tables.search("cccc", vector(0), 5, Filters()) == []
    one = pa.table(
        {"id": ["a"], "domain": [""], "source": [""], "time": pa.array([None], pa.timestamp("us", "UTC")), "text": [""]}
    )
    tables.merge("cccc", one, vector(1)[None])
    with pytest.raises(StoreError, match="dimension"):
        tables.search("cccc", vector(0)[:4], 5, Filters())
    with pytest.raises(StoreError, match="not the name"):
        tables.search("../x", vector(0), 5, Filters())


async def test_a_deleted_sample_leaves_every_table_and_is_not_embedded_again(
    catalog: Catalog, store: SampleStore, encoder: Encoder
) -> None:
    put(store, rows(0, 6), 6)
    await catalog.adopt([THERE, HERE])
    await settle(catalog)
    assert delete(store, "offset IN (1, 4)") == 2
    encoder.calls.clear()
    await settle(catalog)
    for space in ("aaaa", "bbbb"):
        assert stored(catalog.tables, space) == {row["id"] for row in rows(0, 6) if row["offset"] not in (1, 4)}
    assert encoder.calls == []
    assert (catalog.status()["corpus_rows"], catalog.status()["coverage"]) == (4, 1.0)
    hits = await catalog.search("aaaa", vector(4), 10, Filters())
    assert {hit.text for hit in hits} == {"text 0", "text 2", "text 3", "text 5"}


async def test_what_is_deleted_later_by_a_clock_that_is_behind_is_followed(
    catalog: Catalog, store: SampleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, rows(0, 4), 4)
    await catalog.adopt([HERE])
    await settle(catalog)
    delete(store, "offset = 0")
    await settle(catalog)

    class Behind(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) - timedelta(minutes=5)

    monkeypatch.setattr("streams.store.writer.datetime", Behind)
    delete(store, "offset = 1")
    await settle(catalog)
    assert len(stored(catalog.tables, "aaaa")) == 2


async def test_a_deleted_sample_that_is_sent_again_is_embedded_with_what_it_says_now(
    catalog: Catalog, store: SampleStore, encoder: Encoder
) -> None:
    put(store, rows(0, 3), 3)
    await catalog.adopt([HERE])
    await settle(catalog)
    again = {**rows(1, 1)[0], "offset": 3, "source": "new"}
    delete(store, "offset = 1")
    put(store, [again], 4)
    await settle(catalog)
    hits = await catalog.search("aaaa", vector(1), 1, Filters())
    assert (hits[0].id, hits[0].source) == (again["id"], "new")
    assert (catalog.status()["corpus_rows"], catalog.status()["coverage"]) == (3, 1.0)
    put(store, rows(5, 1), 6)
    delete(store, "offset = 5")
    calls = len(encoder.calls)
    await settle(catalog)
    assert len(encoder.calls) == calls, "what was followed once is not followed again"


async def test_a_sample_that_was_deleted_before_it_was_embedded_and_sent_again_is_found(
    catalog: Catalog, store: SampleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, rows(0, 2), 2)
    await catalog.adopt([HERE])
    read = catalog.reconciler.embedder._read

    def deleted_meanwhile(samples: list[str]) -> Any:
        monkeypatch.setattr(catalog.reconciler.embedder, "_read", read)
        delete(store, "offset = 1")
        return read(samples)

    monkeypatch.setattr(catalog.reconciler.embedder, "_read", deleted_meanwhile)
    await settle(catalog)
    assert len(stored(catalog.tables, "aaaa")) == 1
    put(store, [{**rows(1, 1)[0], "offset": 2}], 3)
    await settle(catalog)
    assert len(stored(catalog.tables, "aaaa")) == 2 and catalog.status()["coverage"] == 1.0


async def test_what_was_deleted_while_nobody_followed_leaves_tables_that_nobody_holds_too(
    catalog: Catalog, store: SampleStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, [*rows(0, 60), *rows(60, 1, text="recognisable words")], 61)
    await catalog.adopt([THERE, HERE])
    await settle(catalog)
    delete(store, "offset = 60")
    second = Catalog(Tables(str(tmp_path / "catalog")), store, pixels, Encoder())
    await second.adopt([HERE])
    await settle(second)
    for space in ("aaaa", "bbbb"):
        assert len(stored(second.tables, space)) == 59, space  # one image cannot be read
    assert holds(tmp_path / "catalog", b"recognisable words")
    # It dies, too: the next one knows nothing of what was removed, and removes its bytes all the same.
    monkeypatch.setattr("serving.catalog.reconcile.EXPUNGE_SECONDS", 0.0)
    third = Catalog(Tables(str(tmp_path / "catalog")), store, pixels, Encoder())
    await third.adopt([HERE])
    await settle(third)
    assert not holds(tmp_path / "catalog", b"recognisable words")
    assert holds(tmp_path / "catalog", b"text 59")


async def test_the_bytes_of_one_deleted_row_of_many_go_while_searches_and_appends_go_on(
    catalog: Catalog, store: SampleStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, [*rows(0, 60), *rows(60, 1, text="recognisable words")], 61)
    await catalog.adopt([HERE])
    await settle(catalog)
    monkeypatch.setattr("serving.catalog.reconcile.EXPUNGE_SECONDS", 0.0)
    delete(store, "offset = 60")
    await settle(catalog)
    assert not holds(tmp_path / "catalog", b"recognisable words")
    assert len(await catalog.search("aaaa", vector(3), 100, Filters())) == 59
    put(store, rows(61, 3), 64)
    await settle(catalog)
    assert len(await catalog.search("aaaa", vector(3), 100, Filters())) == 62


async def test_bytes_go_in_two_passes_and_a_failing_one_is_tried_again(
    catalog: Catalog, store: SampleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, passes = [100.0], list[str]()
    monkeypatch.setattr("serving.catalog.reconcile.time.monotonic", lambda: now[0])
    put(store, rows(0, 3), 3)
    await catalog.adopt([HERE])
    await settle(catalog)
    delete(store, "offset = 1")
    failures = [StoreError("away", "")]

    def expunge(space: str, older_than: timedelta) -> None:
        if failures:
            raise failures.pop()
        passes.append(f"{space} at {now[0]:.0f}")

    monkeypatch.setattr(catalog.tables, "expunge", expunge)
    await settle(catalog)
    assert passes == []
    now[0] += 121
    with pytest.raises(StoreError, match="away"):
        await catalog.reconciler.step()
    put(store, rows(3, 1), 4)
    await settle(catalog)
    assert len(stored(catalog.tables, "aaaa")) == 3, "what is new does not wait for it"
    for _ in range(4):
        now[0] += 121
        await settle(catalog)
    assert passes == ["aaaa at 342", "aaaa at 463"]


async def test_two_samples_with_one_id_are_one_until_they_are_settled(catalog: Catalog, store: SampleStore) -> None:
    """Workers that share no index stored the same content at once."""
    [row] = rows(0, 1)
    store.put([row, {**row, "partition": 1}], [Position("t", 0, 1), Position("t", 1, 1)])
    await catalog.adopt([HERE])
    await settle(catalog)
    assert (catalog.status()["corpus_rows"], catalog.status()["coverage"]) == (1, 1.0)


def delete(store: SampleStore, where: str) -> int:
    return len(StoreWriter(store.table).remove(where, "deletion", "d"))
