"""Deletions of samples, followed from the sample store into every table of the catalog."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import numpy as np

from serving.catalog.coverage import CorpusIds, SpaceCoverage
from serving.catalog.embedding import Corpus
from serving.catalog.tables import Tables

log = logging.getLogger("ratchet.catalog")
EXPUNGE_SECONDS: Final = 120.0
"""After deletions, removed rows are written out after this long, and the versions that have them go after as long
again: far longer than a search takes."""
OVERLAP: Final = timedelta(minutes=10)
"""Deletions are looked for from this long before the last one: clocks of those who delete differ."""
InThread = Callable[..., Awaitable[Any]]
"""Calls a function with its arguments in the one thread that writes tables."""


class DeletionFollower:
    """Takes out of every table on the disk, resident or not, what was deleted. Use from one event loop."""

    def __init__(self, tables: Tables, corpus: Corpus, ids: CorpusIds, in_thread: InThread) -> None:
        self._tables = tables
        self._corpus = corpus
        self._ids = ids
        self._in_thread = in_thread
        self._count = 0
        self._until = datetime.min.replace(tzinfo=UTC)
        self._followed: set[tuple[str, datetime]] = set()
        self._started = False
        self._expunge_at = float("inf")
        self._expunge_left = 0

    async def follow(self, version: int, spaces: Mapping[str, SpaceCoverage]) -> None:
        """What was deleted since the last call. ``spaces``: those whose rows are known."""
        if not self._started:
            await self._take_stock(version)
            self._started = True
            return
        count = (await self._in_thread(self._corpus.tally, version))["deleted"]
        if count == self._count:
            return
        receipts = await self._receipts(version)
        gone = {sample for sample, _ in receipts - self._followed}
        again = await self._in_thread(
            lambda: self._corpus.scan(version, columns=["id"], ids=sorted(gone), having="text")
        )
        for space in await self._in_thread(self._tables.spaces):
            await self._remove(space, gone, spaces.get(space))
        self._ids.remove(gone)
        self._ids.add(again["id"].to_pylist())  # deleted, and sent again since: embedded anew
        self._count, self._followed = count, receipts
        self._until = max([self._until, *(when for _, when in receipts)])

    async def expunge(self) -> bool:
        """Remove the bytes of deleted rows, once no search reads the versions that have them.

        In two passes: the first writes the rows that stay anew, the second removes the versions from before the first.
        Returns whether it was time for a pass.
        """
        if not self._expunge_left or time.monotonic() < self._expunge_at:
            return False
        self._expunge_at = time.monotonic() + EXPUNGE_SECONDS  # also when it fails: the loop goes on meanwhile
        for space in await self._in_thread(self._tables.spaces):
            await self._in_thread(self._tables.expunge, space, timedelta(seconds=EXPUNGE_SECONDS / 2))
        self._expunge_left -= 1
        return True

    async def _take_stock(self, version: int) -> None:
        """At the first look: take out what was deleted while nobody followed, and note what there is to follow."""
        for space in await self._in_thread(self._tables.spaces):
            await self._remove(space, await self._in_thread(self._not_in_corpus, space), None)
            self._expunge_soon()  # who removed rows before may have died before their bytes were gone
        self._count = (await self._in_thread(self._corpus.tally, version))["deleted"]
        self._until = datetime.now(UTC)
        self._followed = await self._receipts(version)

    def _not_in_corpus(self, space: str) -> set[str]:
        return {sample for batch in self._tables.id_batches(space) for sample in batch if sample not in self._ids}

    async def _receipts(self, version: int) -> set[tuple[str, datetime]]:
        rows = await self._in_thread(self._corpus.deleted, version, self._until - OVERLAP)
        return set(zip(rows["id"].to_pylist(), rows["ingested_at"].to_pylist(), strict=True))

    async def _remove(self, space: str, samples: set[str], coverage: SpaceCoverage | None) -> None:
        numbers = np.empty(0, np.int64)
        if coverage is not None:
            numbers = coverage.holding(self._ids.numbers(samples))
            samples = set(self._ids.names(numbers))
        if not samples:
            return
        await self._in_thread(self._tables.remove, space, samples)
        if coverage is not None:
            coverage.drop(numbers)
        log.info("%d deleted samples left the catalog of %s", len(samples), space)
        self._expunge_soon()

    def _expunge_soon(self) -> None:
        self._expunge_at, self._expunge_left = time.monotonic() + EXPUNGE_SECONDS, 2
