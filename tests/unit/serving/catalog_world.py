"""A catalog on a real sample store and real tables, with a scripted encoder."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import RecordError, StoreError
from serving.catalog.catalog import Catalog
from serving.catalog.queries import Filters, Hit, Search
from serving.catalog.tables import Tables
from serving.releases.types import ReleaseSnapshot
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from streams.store.writer import StoreWriter

DIM = 8
HERE = ReleaseSnapshot(1, None, "aaaa", "t")
THERE = ReleaseSnapshot(2, "clip-x", "bbbb", "t")
ALL = Filters()


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


def pixels(data: bytes) -> np.ndarray:
    if data == b"13":
        raise RecordError("image_undecodable", "unlucky")
    return np.full((2, 2, 3), int(data) % 256, np.uint8)


class Encoder:
    """Vectors that depend on image and adapter; counts calls, and fails at those of the numbers ``failing``."""

    def __init__(self, *failing: int) -> None:
        self.failing = failing
        self.calls: list[tuple[int, str | None]] = []
        self.gate: asyncio.Event | None = None

    async def __call__(self, batch: np.ndarray, clip: str | None) -> np.ndarray:
        if len(self.calls) in self.failing:
            self.calls.append((0, clip))
            raise StoreError("the replica died", "")
        self.calls.append((len(batch), clip))
        if self.gate is not None:
            await self.gate.wait()
        return np.stack([vector(int(image[0, 0, 0]) + (1000 if clip else 0)) for image in batch])


class World(Catalog):
    """A server's catalog. A second one on the same folder is that of another server, or of a restart."""

    def __init__(self, folder: Path, encoder: Encoder | None = None) -> None:
        self.encoder = encoder or Encoder()
        store = SampleStore(str(folder / "lake"))
        super().__init__(Tables(str(folder / "catalog"), folder / "index"), store, pixels, self.encoder)

    def put(self, start: int, count: int, **extra: Any) -> None:
        self.corpus.put(rows(start, count, **extra), [Position("t", 0, extra.get("offset", start + count - 1) + 1)])

    def delete(self, where: str) -> int:
        return len(StoreWriter(self.corpus.table).remove(where, "deletion", "d"))

    async def settle(self) -> None:
        while await self.reconciler.step():
            pass

    async def hold(self, *window: ReleaseSnapshot) -> None:
        await self.adopt(window)
        await self.settle()

    def stored(self, space: str = "aaaa") -> list[str]:
        return [sample for batch in self.tables.id_batches(space) for sample in batch]

    async def texts(self, seed: int, k: int = 100, space: str = "aaaa", filters: Filters = ALL) -> list[str]:
        return [hit.text for hit in await self.hits(seed, k, space, filters)]

    async def hits(self, seed: int, k: int = 100, space: str = "aaaa", filters: Filters = ALL) -> Sequence[Hit]:
        return (await self.search(space, Search([vector(seed)], k, filters))).hits[0]
