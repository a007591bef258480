"""The catalog as a server runs it: reconcile loop, tables, index maintainer, searches. Samples and encoders are fakes.

A sample's image is its number, and "encoding" it looks its vector up, so that only the catalog's own cost is measured.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from benchmarks.search.mixture import NEIGHBOURS, Vectors, map_rows
from benchmarks.search.worker import private_gib, serve
from core.errors import StoreError
from serving.catalog import index_maintainer
from serving.catalog.catalog import Catalog
from serving.catalog.queries import Filters, Hit, Search, as_filters
from serving.catalog.tables import Tables
from serving.releases.types import ReleaseSnapshot

Result = TypeVar("Result")
SNAPSHOT: Final = ReleaseSnapshot(1, None, "aaaaaaaaaaaa", "tttttttttttt")
DOMAINS: Final = 20
ARRIVALS, ARRIVAL_ROWS = 20, 256
SAME: Final = 1e-5
"""Scores that differ by less are equal."""
MIX: Final = 0x9E3779B97F4A7C15F39CC0605CEDC8341082276BF3A27251F86C6A11D0C18E95
SPAN: Final = 1 << 256
"""IDs are numbers times an odd constant: they look like digests, and each can be mapped back to its number."""
BACK: Final = pow(MIX, -1, SPAN)


class NumberCorpus:
    """The part of a sample store that the catalog reads, over the numbers from 0."""

    def __init__(self) -> None:
        self.rows = 0

    def version(self) -> int:
        return self.rows

    def offsets(self, version: int | None = None) -> dict[str, int]:
        return {"t:0": self.rows if version is None else version}

    def tally(self, version: int | None = None) -> Mapping[str, int]:
        return {"deleted": 0}

    def deleted(self, version: int | None = None, since: datetime | None = None) -> pa.Table:
        return pa.table({"id": pa.array([], pa.string()), "ingested_at": pa.array([], pa.timestamp("us", "UTC"))})

    def scan(
        self, version: int | None = None, *, after: Mapping[str, int] | None = None,
        columns: Sequence[str] | None = None, ids: Sequence[str] | None = None, having: Any = None,
    ) -> pa.Table:  # fmt: skip
        start, end = (after or {}).get("t:0", 0), self.rows if version is None else version
        numbers = [number_of(sample) for sample in ids] if ids is not None else list(range(start, end))
        count, now = len(numbers), datetime.now(UTC)
        made: dict[str, Callable[[], Any]] = {
            "id": lambda: [id_of(number) for number in numbers],
            "image": lambda: [number.to_bytes(8, "little") for number in numbers],
            "domain": lambda: [f"domain {number % DOMAINS}" for number in numbers],
            "source": lambda: ["bench"] * count,
            "time": lambda: pa.array([now] * count, pa.timestamp("us", "UTC")),
            "ingested_at": lambda: pa.array([now] * count, pa.timestamp("us", "UTC")),
            "text": lambda: [f"a caption of some words, number {number}" for number in numbers],
            "question": lambda: pa.nulls(count, pa.string()),
            "answer": lambda: pa.nulls(count, pa.string()),
            "concept": lambda: pa.nulls(count, pa.string()),
            "label": lambda: pa.nulls(count, pa.string()),
            "tags": lambda: pa.nulls(count, pa.list_(pa.string())),
        }
        return pa.table({name: made[name]() for name in columns or made})


def id_of(number: int) -> str:
    """64 hex digits."""
    return f"{number * MIX % SPAN:064x}"


def number_of(sample: str) -> int:
    return int(sample, 16) * BACK % SPAN


class CatalogSide:
    """A running catalog."""

    def __init__(self, folder: Path, index_rows: int) -> None:
        self._folder = folder
        self._vectors = map_rows(folder / "rows.f32")
        self._queries = map_rows(folder / "queries.f32")
        self._truth: Vectors = np.empty((0, NEIGHBOURS), np.float32)
        self._corpus: Any = NumberCorpus()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._catalog = self._in_loop(self._start(index_rows))

    def grow(self, rows: int) -> dict[str, Any]:
        """Backfill up to this many rows, the last of which arrive a few at a time; then make the index."""
        return self._in_loop(self._grow(rows))

    def measure(self, callers: int, seconds: float, filtered: bool) -> dict[str, Any]:
        """``filtered``: under a condition that one row in twenty meets."""
        return self._in_loop(self._measure(callers, seconds, filtered))

    async def _start(self, index_rows: int) -> Catalog:
        async def encode(numbers: npt.NDArray[np.uint8], clip: str | None) -> Vectors:
            return self._vectors[np.ascontiguousarray(numbers).view(np.int64).reshape(-1)]

        tables = Tables(str(self._folder / "catalog"), self._folder / "index")
        index_maintainer.INDEX_ROWS = index_rows  # type: ignore[misc]
        self._catalog = Catalog(tables, self._corpus, lambda data: np.frombuffer(data, np.uint8), encode)
        await self._catalog.adopt([SNAPSHOT])
        self._running = asyncio.get_running_loop().create_task(self._catalog.run())
        return self._catalog

    async def _grow(self, rows: int) -> dict[str, Any]:
        before, arriving = self._corpus.rows, min(ARRIVALS * ARRIVAL_ROWS, rows // 10)
        began = time.perf_counter()
        self._corpus.rows = rows - arriving
        await self._covered(rows - arriving)
        backfilled = time.perf_counter()
        for _ in range(0, arriving, ARRIVAL_ROWS):
            self._corpus.rows = min(rows, self._corpus.rows + ARRIVAL_ROWS)
            await self._covered(self._corpus.rows)
        arrived = time.perf_counter()
        await self._catalog.cover(SNAPSHOT)  # the index, too
        self._truth = np.load(self._folder / f"truth-{rows}.npy")
        while (index := self._index())["rows"] and not index["saved"]:
            await asyncio.sleep(0.1)
        if index["trouble"]:
            raise StoreError(f"the index cannot be made: {index['trouble']}")
        return {
            "backfill_rows_per_second": round((rows - arriving - before) / (backfilled - began)),
            "ingest_rows_per_second": round(arriving / (arrived - backfilled)),
            "index_build_seconds": round(index["build_seconds"], 1),
            "index_recall": index["recall"], "index_used": index["used"],
            "effort": index["effort"], "coding": index["coding"], "index_gib": round(index["bytes"] / 2**30, 3),
            "memory_gib": private_gib(),
        }  # fmt: skip

    def _index(self) -> dict[str, Any]:
        index: dict[str, Any] = self._catalog.status()["spaces"][SNAPSHOT.image_space]["index"]
        return index

    async def _covered(self, rows: int) -> None:
        while self._catalog.searchable()[1] < rows:
            await asyncio.sleep(0.005)

    async def _measure(self, callers: int, seconds: float, filtered: bool) -> dict[str, Any]:
        took: list[float] = []
        found: dict[int, list[Hit]] = {}
        end = time.perf_counter() + seconds

        async def search(row: int) -> list[Hit]:
            filters = self._condition(row) if filtered else Filters()
            found = await self._catalog.search(SNAPSHOT.image_space, Search([self._queries[row]], NEIGHBOURS, filters))
            return list(found.hits[0])

        async def call(first: int) -> None:
            number = first
            while (began := time.perf_counter()) < end:
                row = number % len(self._queries)
                found[row] = await search(row)
                took.append(time.perf_counter() - began)
                number += callers

        await asyncio.gather(*(call(first) for first in range(callers)))
        rows = range(len(self._queries) // 10 if filtered else len(self._queries))
        for row in rows:  # recall is of the same queries, however many the time allowed
            if row not in found:
                found[row] = await search(row)
        recalls = [self._recall(row, found[row], self._exact(row) if filtered else self._truth[row]) for row in rows]
        return {
            "qps": round(len(took) / seconds, 1), "p50": float(np.quantile(took, 0.5)),
            "p99": float(np.quantile(took, 0.99)), "recall": float(np.mean(recalls)), "memory_gib": private_gib(),
        }  # fmt: skip

    def _condition(self, row: int) -> Filters:
        return as_filters(domain=[f"domain {row % DOMAINS}"])

    def _recall(self, row: int, hits: Sequence[Hit], exact: Vectors) -> float:
        """By exact scores of the hits, because an index returns rounded ones."""
        numbers = [number_of(hit.id) for hit in hits[: len(exact)]]
        scores = self._vectors[numbers] @ self._queries[row]
        return float((scores >= exact[-1] - SAME).sum() / len(exact))

    def _exact(self, row: int) -> Vectors:
        rows = self._vectors[row % DOMAINS : self._corpus.rows : DOMAINS]
        return np.asarray(np.sort(rows @ self._queries[row])[::-1][:NEIGHBOURS])

    def _in_loop(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


if __name__ == "__main__":
    serve(CatalogSide(Path(sys.argv[1]), int(sys.argv[2])))
