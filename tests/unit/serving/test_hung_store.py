from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import StoreUnavailable
from serving.catalog import catalog as catalogs
from serving.catalog.catalog import Catalog
from serving.catalog.queries import Filters, Hit
from serving.catalog.tables import Tables
from serving.releases.types import ReleaseSnapshot
from streams.store.sample_store import SampleStore

HERE = ReleaseSnapshot(1, None, "aaaa", "t")
QUERY = np.ones(8, np.float32)
HIT = Hit("id", 0.5, "", "", "", None)


class HungStore:
    """Reads wait until the store answers again."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.reads = 0

    def read(self, *_: Any) -> list[Hit]:
        self.reads += 1
        self.answers.wait(60)
        return [HIT]


@pytest.fixture
def hung() -> Iterator[HungStore]:
    store = HungStore()
    yield store
    store.answers.set()


@pytest.fixture
async def catalog(tmp_path: Path, hung: HungStore, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    monkeypatch.setattr(catalogs, "READ_SECONDS", 0.3)
    monkeypatch.setattr(catalogs, "RETRY_SECONDS", 0.5)
    tables, encode = Tables(str(tmp_path / "catalog"), tmp_path / "index"), lambda *_: None
    made = Catalog(tables, SampleStore(str(tmp_path)), lambda _: QUERY, encode)  # type: ignore[arg-type, return-value]
    await made.adopt([HERE])
    monkeypatch.setattr(made.tables, "search", hung.read)
    return made


async def search(catalog: Catalog) -> list[Hit]:
    return await catalog.search(HERE.image_space, QUERY, 1, Filters())


async def refuse(catalog: Catalog, times: int) -> None:
    for _ in range(times):
        with pytest.raises(StoreUnavailable, match="does not answer"):
            await search(catalog)
        time.sleep(0.1)


async def test_searches_end_within_a_bound_and_are_answered_again_when_the_store_is(
    catalog: Catalog, hung: HungStore
) -> None:
    began = time.monotonic()
    await refuse(catalog, 10)  # more than there are threads
    assert time.monotonic() - began < 10 and hung.reads < 5
    hung.answers.set()
    end = time.monotonic() + 30
    while True:
        try:
            assert await search(catalog) == [HIT]
            break
        except StoreUnavailable:
            assert time.monotonic() < end
            time.sleep(0.05)
    for _ in range(10):
        assert await search(catalog) == [HIT]


async def test_a_space_with_an_index_is_searched_without_the_store(
    catalog: Catalog, hung: HungStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await refuse(catalog, 10)
    monkeypatch.setattr(catalog.tables.indexes, "usable", lambda space: ("index", "effort"))
    monkeypatch.setattr(catalog.tables, "search_index", lambda *_: ([HIT], [HIT.id]))
    monkeypatch.setattr(catalog.tables, "with_texts", hung.read)
    for _ in range(10):
        assert await search(catalog) == [HIT]


async def test_an_image_of_a_sample_ends_within_a_bound_too(
    catalog: Catalog, hung: HungStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "corpus", type("Corpus", (), {"scan": lambda self, **_: hung.read()})())
    with pytest.raises(StoreUnavailable):
        await catalog.image("f" * 64)
