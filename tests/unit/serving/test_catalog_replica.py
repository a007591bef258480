from __future__ import annotations

import asyncio
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from core.settings import Settings
from core.settings.serving import Serve
from serving.catalog.catalog import Catalog
from serving.engines.preprocess import Preprocess
from serving.messages import EncodeResult
from serving.releases.types import ReleaseSnapshot, Residency
from serving.replicas import catalog as catalog_replica
from serving.replicas.catalog import CatalogReplica
from tests.unit.serving.catalog_world import ALL, HERE, THERE, World, vector


class Ledger:
    """Has one release, or is unavailable."""

    def __init__(self, window: tuple[ReleaseSnapshot, ...]) -> None:
        self.window = window

    async def read(self, newer_than: int) -> Residency | None:
        if not self.window:
            raise TimeoutError
        return Residency(self.window, self.window, ()) if self.window[0].release > newer_than else None


def replica(catalog: Catalog, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> Any:
    one: Any = object.__new__(CatalogReplica)
    one.catalog, one._residency_reader, one._adopting, one._adopted = catalog, ledger, asyncio.Lock(), 1

    async def adopt(window: tuple[ReleaseSnapshot, ...]) -> None:
        await catalog.adopt(window)

    async def started() -> Catalog:
        return catalog

    monkeypatch.setattr(one, "_adopt", adopt)
    monkeypatch.setattr(one, "_started", started)
    return one


async def test_a_search_in_a_space_that_another_server_released_is_answered_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, ours = World(tmp_path), World(tmp_path)
    other.put(0, 6)
    await other.hold(THERE, HERE)
    await ours.adopt([HERE])
    one = replica(ours, Ledger((THERE, HERE)), monkeypatch)
    (hit,) = await one.search(THERE.image_space, vector(1003), 1, ALL)
    assert hit.text == "text 3"


async def test_while_the_ledger_is_away_it_says_that_there_is_no_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = replica(World(tmp_path), Ledger(()), monkeypatch)
    assert "has no index here" in await one.search("bbbb", vector(3), 1, ALL)


async def test_a_sample_that_ingest_accepted_is_indexed_though_a_request_may_not_be_so_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(home=tmp_path, serve=Serve(max_image_bytes=1024, max_pixels=100))
    image = jpeg(40, 30)
    assert len(image) > settings.serve.max_image_bytes
    World(tmp_path).put(0, 1, image=image)
    for name in ("begin_replica", "freeze_gc"):
        monkeypatch.setattr(catalog_replica, name, lambda *_: None)

    async def at_once() -> None:
        pass

    monkeypatch.setattr(catalog_replica, "wait_for_clip", at_once)
    base = SimpleNamespace(preprocess=Preprocess(size=16))
    monkeypatch.setattr("serving.engines.clip_base.load_base", lambda *_: base)

    async def encode(_: str, batch: np.ndarray, __: str | None) -> EncodeResult:
        return EncodeResult(np.stack([vector(3) for _ in batch]), None)

    encoder: Any = SimpleNamespace(encode_background=SimpleNamespace(remote=encode))
    one = object.__new__(CatalogReplica)
    await one.__init__(settings, encoder)  # type: ignore[misc]
    await one.catalog.adopt([HERE])
    while await one.catalog.reconciler.step():
        pass
    (hit,) = await one.catalog.search(HERE.image_space, vector(3), 1, ALL)
    assert hit.text == "text 0"


def jpeg(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 90).save(buffer, "JPEG", quality=100)
    return buffer.getvalue()
