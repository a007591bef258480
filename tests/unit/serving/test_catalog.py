"""Tables, filters and the reconcile loop, on real LanceDB and a real sample store."""

from __future__ import annotations

import asyncio
import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ops.errors import RecordError, StoreError
from serving.catalog.queries import Filters, as_filters
from serving.catalog.reconcile import BATCH_ROWS, Catalog
from serving.catalog.tables import Tables
from serving.deployments.stamps import Stamp
from streams.rows import Position
from streams.store import SampleStore
from tests.support.waiting import until

DIM = 8
HERE = Stamp(1, None, "aaaa", "t")
THERE = Stamp(2, "clip-x", "bbbb", "t")


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
def store(tmp_path: Path) -> SampleStore:
    return SampleStore(str(tmp_path / "lake"))


@pytest.fixture
def encoder() -> Encoder:
    return Encoder()


@pytest.fixture
def catalog(tmp_path: Path, store: SampleStore, encoder: Encoder) -> Catalog:
    return Catalog(Tables(str(tmp_path / "catalog")), store, pixels, encoder)


async def settle(catalog: Catalog) -> None:
    while await catalog.step():
        pass


async def test_every_row_is_in_every_resident_space(catalog: Catalog, store: SampleStore, encoder: Encoder) -> None:
    put(store, rows(0, BATCH_ROWS + 5), BATCH_ROWS + 5)
    await catalog.adopt([THERE, HERE])
    await settle(catalog)
    for stamp in (HERE, THERE):
        assert len(catalog.tables.ids(stamp.image_space)) == BATCH_ROWS + 4  # one image cannot be read
    assert catalog.status()["coverage"] == 1.0
    put(store, rows(50, 1), 51)
    await settle(catalog)
    assert encoder.calls[-2:] == [(1, "clip-x"), (1, None)]  # only what is new, the live space first


async def test_cover_returns_when_the_space_is_complete(catalog: Catalog, store: SampleStore) -> None:
    put(store, rows(0, 10), 10)
    running = asyncio.create_task(catalog.run())
    assert await asyncio.wait_for(catalog.cover(HERE), 20) == 10
    hits = await catalog.search("aaaa", vector(3), 1, Filters())
    assert (hits[0].text, round(hits[0].score, 4)) == ("text 3", 1.0)
    running.cancel()


async def test_a_restart_embeds_nothing_again(
    catalog: Catalog, store: SampleStore, encoder: Encoder, tmp_path: Path
) -> None:
    put(store, rows(0, 10), 10)
    await catalog.adopt([HERE])
    await settle(catalog)
    again = Encoder()
    second = Catalog(Tables(str(tmp_path / "catalog")), store, pixels, again)
    await second.adopt([HERE])
    await settle(second)
    assert again.calls == []
    assert second.status()["coverage"] == 1.0


async def test_retire_drops_what_no_release_needs(catalog: Catalog, store: SampleStore) -> None:
    put(store, rows(0, 4), 4)
    await catalog.adopt([THERE, HERE])
    await settle(catalog)
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
    stepping = asyncio.create_task(catalog.step())
    await until(lambda: encoder.calls)
    await catalog.retire([])
    encoder.gate.set()
    await stepping
    await catalog.adopt([HERE])
    await settle(catalog)
    assert len(catalog.tables.ids("aaaa")) == 6


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
    tables.append("cccc", one, vector(1)[None])
    with pytest.raises(StoreError, match="dimension"):
        tables.search("cccc", vector(0)[:4], 5, Filters())
    with pytest.raises(StoreError, match="no name"):
        tables.search("../x", vector(0), 5, Filters())
