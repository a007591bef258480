"""The backfill of one image space: what is being embedded for it, and what waits to be stored."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from serving.catalog.coverage import BackfillRate, CorpusIds, Numbers, SpaceCoverage
from serving.catalog.deletions import InThread
from serving.catalog.embedding import CHUNK_ROWS, Embedded, Embedder
from serving.catalog.tables import Tables

log = logging.getLogger("ratchet.catalog")
STORE_ROWS: Final = 1024
STORE_SECONDS: Final = 2.0
"""Vectors are stored when there are so many of them, when the first one is so old, or when nothing else is missing.
A commit a second costs little, a kill loses two seconds of work, and what is new is found at once."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Samples that are embedded in one call, with their numbers in the corpus."""

    numbers: Numbers
    samples: list[str]


class SpaceFill:
    """Brings one space to full coverage. Use from one event loop; let one call to :meth:`store` run at a time."""

    def __init__(self, space: str, clip: str | None, ids: CorpusIds, tables: Tables, in_thread: InThread) -> None:
        self.space = space
        self.clip = clip
        """An adapter that makes vectors of this space."""
        self.complete = -1
        """Version of the corpus whose rows are all in the table; -1: none yet."""
        self.coverage = SpaceCoverage(ids)
        self.rate = BackfillRate()
        self.loaded = False
        self._ids = ids
        self._tables = tables
        self._in_thread = in_thread
        self._running: dict[asyncio.Task[Embedded], Chunk] = {}
        self._finished: list[tuple[Chunk, Embedded]] = []
        self._finished_at = 0.0

    @property
    def running(self) -> set[asyncio.Task[Embedded]]:
        """Chunks that are being embedded."""
        return set(self._running)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being embedded and nothing waits to be stored."""
        return not self._running and not self._finished

    async def load(self) -> None:
        """Learn which rows the table has."""
        for numbers in await self._in_thread(self._stored):
            self.coverage.hold(numbers)
        self.loaded = True

    def start(self, embedder: Embedder) -> bool:
        """Begin to embed the next chunk. False when nothing is missing that is not being embedded."""
        numbers = self.coverage.take(CHUNK_ROWS)
        if not len(numbers):
            return False
        self.rate.begin()
        chunk = Chunk(numbers, self._ids.names(numbers))
        self._running[asyncio.get_running_loop().create_task(self._embed(embedder, chunk.samples))] = chunk
        return True

    def collect(self) -> list[BaseException]:
        """Take over the chunks that are done. Returns why others failed, which are missing again."""
        errors: list[BaseException] = []
        for task in [task for task in self._running if task.done()]:
            chunk = self._running.pop(task)
            if task.cancelled() or (error := task.exception()) is not None:
                self.coverage.give_back(chunk.numbers)
                errors += [] if task.cancelled() or error is None else [error]
                continue
            if not self._finished:
                self._finished_at = time.monotonic()
            self._finished.append((chunk, task.result()))
        return errors

    def is_due(self) -> bool:
        """Whether it is time to store what is embedded."""
        rows = sum(len(chunk.numbers) for chunk, _ in self._finished)
        late = time.monotonic() - self._finished_at > STORE_SECONDS
        last = not self._running and self.coverage.missing <= rows
        return bool(self._finished) and (rows >= STORE_ROWS or late or last)

    async def store(self) -> pa.Table | None:
        """Add what is embedded to the table, in one commit. Returns the rows that were added (or were there)."""
        finished, self._finished = self._finished, []
        try:
            return await self._store(finished)
        finally:
            for chunk, _ in finished:
                self.coverage.give_back(chunk.numbers)

    def cancel(self) -> None:
        """Stop what is being embedded; nothing more is stored."""
        for task in self._running:
            task.cancel()
        self._finished = []

    def status(self) -> dict[str, Any]:
        """Rows, coverage from 0 to 1, and how the backfill gets on."""
        missing = self.coverage.missing
        return {
            "rows": self.coverage.rows,
            "coverage": self.coverage.ratio,
            "missing": missing,
            "rows_per_second": self.rate.per_second if missing else 0.0,
            "seconds_left": self.rate.seconds_left(missing),
        }

    async def _embed(self, embedder: Embedder, samples: list[str]) -> Embedded:
        present = await self._in_thread(self._tables.present, self.space, samples)  # by the catalog of another server
        absent = [sample for sample in samples if sample not in present]
        embedded = await embedder.embed(absent, self.clip)
        return Embedded(embedded.rows, embedded.vectors, embedded.unreadable, frozenset(present))

    async def _store(self, finished: list[tuple[Chunk, Embedded]]) -> pa.Table | None:
        wanted = self._ids.wanted()
        names: dict[str, int] = {}
        for chunk, embedded in finished:
            current = [
                (number, name)
                for number, name in zip(chunk.numbers.tolist(), chunk.samples, strict=True)
                if wanted[number]  # not deleted meanwhile
            ]
            names.update({name: number for number, name in current})
            self._ids.leave_out(name for _, name in current if name in embedded.unreadable)
            self.coverage.hold(np.asarray([n for n, name in current if name in embedded.present], np.int64))
        parts = [(each.rows, each.vectors) for _, each in finished if len(each.vectors)]
        if not parts:
            return None
        rows, vectors = pa.concat_tables([rows for rows, _ in parts]), np.concatenate([part for _, part in parts])
        here = np.asarray([index for index, name in enumerate(rows["id"].to_pylist()) if name in names], np.int64)
        if not len(here):
            return None
        rows = rows.take(here)
        await self._in_thread(self._tables.merge, self.space, rows, vectors[here])
        numbers = np.asarray([names[name] for name in rows["id"].to_pylist()], np.int64)
        self.coverage.hold(numbers)
        self.rate.add(len(numbers))
        return rows

    def _stored(self) -> list[Numbers]:
        return [self._ids.numbers(batch) for batch in self._tables.id_batches(self.space)]
