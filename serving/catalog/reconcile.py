"""The reconcile loop: every corpus row in every resident image space, and no deleted row in any table. It is backfill,
catch-up and dual-write in one, and resumes from the tables: a kill loses only the last seconds."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import numpy as np

from core import metrics
from core.dependencies import answered
from serving.catalog.space_fill import CorpusIds, Embedder, Encode, InThread, Pixels, SpaceCoverage, SpaceFill
from serving.catalog.tables import Tables
from serving.releases.types import ReleaseSnapshot
from streams.store.sample_store import SampleStore

log = logging.getLogger("ratchet.catalog")
EXPUNGE_SECONDS: Final = 120.0
"""Tables are rewritten this long after deletions, and old versions removed after as long again."""
OVERLAP: Final = timedelta(minutes=10)
"""Deletion receipts are read from this long before the last one, because the clocks of the deleting hosts differ."""


class Reconciler:
    """Brings the tables of the resident spaces in line with the corpus. Use from one event loop."""

    def __init__(self, tables: Tables, corpus: SampleStore, pixels: Pixels, encode: Encode) -> None:
        self.ids = CorpusIds()
        self.fills: dict[str, SpaceFill] = {}
        self.live_space = ""
        self.embedder = Embedder(corpus, pixels, encode)
        self.woken = asyncio.Event()
        """Set to make the next step at once."""
        self.changed = asyncio.Condition()
        self.searchable_seconds: float | None = None
        self.last_error = ""
        self._tables = tables
        self._corpus = corpus
        self._io = ThreadPoolExecutor(1, "catalog")
        self._deletions = DeletionFollower(tables, corpus, self.ids, self.in_thread)
        self._version = -1
        self._offsets: dict[str, int] = {}
        self._reported = (-1, "")

    def add_space(self, snapshot: ReleaseSnapshot) -> SpaceFill:
        """Keep the snapshot's image space filled from now on."""
        fill = self.fills.get(snapshot.image_space)
        if fill is None:
            fill = SpaceFill(snapshot.image_space, snapshot.clip, self.ids, self._tables, self.in_thread)
            self.fills[snapshot.image_space] = fill
        return fill

    def remove_space(self, space: str) -> None:
        self.fills.pop(space).cancel()

    def reopen(self, space: str) -> None:
        """Open an unreadable table again; if it is gone, it is made again."""
        self._tables.forget(space)
        old = self.fills.pop(space, None)
        if old is not None:
            old.cancel()
            self.add_space(ReleaseSnapshot(0, old.clip, space, ""))
        self.woken.set()

    def spaces(self) -> dict[str, bool]:
        """Resident spaces, the live one first; True for those that have, or had, every row."""
        return {fill.space: fill.complete >= 0 for fill in self._ordered()}

    def complete(self) -> set[str]:
        """Resident spaces that have, or had, every row."""
        return {fill.space for fill in self.fills.values() if fill.complete >= 0}

    def prefer(self, space: str, samples: Collection[str]) -> None:
        if samples and (fill := self.fills.get(space)) is not None:
            fill.coverage.prefer(self.ids.numbers(samples))

    async def in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function in the single thread that writes tables."""
        return await asyncio.get_running_loop().run_in_executor(self._io, function, *args)

    async def step(self) -> bool:
        """Check the corpus, keep the encoders busy, and store their results. True if there was work."""
        version = await self.in_thread(self._corpus.version)
        if version != self._version:
            await self._look(version)
        worked = await self._deletions.expunge()
        fills = self._ordered()
        for fill in fills:
            worked |= await self._start(fill, version)
        running = set().union(*(fill.running for fill in fills))
        if running:
            worked = True
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        errors = [error for fill in fills for error in fill.collect()]
        for fill in fills:
            if fill.is_due() and self.fills.get(fill.space) is fill:  # a retired space's table must not come back
                await self._store(fill)
        if completed := [fill for fill in fills if fill.is_complete and fill.complete != version]:
            for fill in completed:
                fill.complete = version
            async with self.changed:
                self.changed.notify_all()
        if worked or self._reported != (version, self.live_space):
            self._report()
            self._reported = (version, self.live_space)
        self.last_error = str(errors[0])[:300] if errors else ""
        if errors:
            raise errors[0]
        answered(["store"])
        return worked

    async def _look(self, version: int) -> None:
        seen, columns = dict(self._offsets), ["id", "ingested_at"]
        rows = await self.in_thread(lambda: self._corpus.scan(version, after=seen, columns=columns, having="text"))
        self.ids.add(rows.sort_by("ingested_at")["id"].to_pylist())
        self._offsets = await self.in_thread(self._corpus.offsets, version)
        loaded = {space: fill.coverage for space, fill in self.fills.items() if fill.loaded}
        await self._deletions.follow(version, loaded)
        self._version = version

    async def _start(self, fill: SpaceFill, version: int) -> bool:
        """Start chunks while there is room. True if the space is not complete."""
        if fill.complete == version or self.fills.get(fill.space) is not fill:
            return False
        if not fill.loaded:
            await self.in_thread(self._tables.upgrade, fill.space, self._corpus)
            await fill.load()
            if self.fills.get(fill.space) is not fill:
                return False
        while sum(len(each.running) for each in self.fills.values()) < self.embedder.pace.width:
            if not fill.start(self.embedder):
                break
        return not fill.is_idle

    async def _store(self, fill: SpaceFill) -> None:
        rows = await fill.store()
        if rows is not None and fill.space == self.live_space and fill.complete >= 0:  # otherwise it is a backfill
            self._record_delays(rows["ingested_at"].to_pylist())

    def _report(self) -> None:
        status = {fill.space: fill.status() for fill in self.fills.values()}
        live = status.get(self.live_space, {})
        metrics.catalog.covered(live.get("rows", 0), min((each["coverage"] for each in status.values()), default=0.0))
        left = [each["seconds_left"] for each in status.values()]
        metrics.catalog.backfill(
            sum(each["missing"] for each in status.values()),
            sum(each["rows_per_second"] for each in status.values()),
            None if None in left else max(left, default=0.0),
        )

    def _record_delays(self, ingested: list[datetime | None]) -> None:
        """Record how long samples took to become searchable under the live release."""
        for moment in ingested:
            if moment is not None:
                aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
                self.searchable_seconds = max(0.0, time.time() - aware.timestamp())
                metrics.catalog.searchable(self.searchable_seconds)

    def _ordered(self) -> list[SpaceFill]:
        return sorted(self.fills.values(), key=lambda fill: fill.space != self.live_space)


class DeletionFollower:
    """Removes deleted samples from every table on disk, resident or not. Use from one event loop."""

    def __init__(self, tables: Tables, corpus: SampleStore, ids: CorpusIds, in_thread: InThread) -> None:
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
        """Remove what was deleted since the last call. ``spaces``: those whose rows are known."""
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
        self._ids.add(again["id"].to_pylist())  # deleted and sent again since: embedded again
        self._count, self._followed = count, receipts
        self._until = max([self._until, *(when for _, when in receipts)])

    async def expunge(self) -> bool:
        """Remove the bytes of deleted rows once no search reads versions that contain them. Two passes: the first
        rewrites the remaining rows, the second removes the older versions. True if a pass was due."""
        if not self._expunge_left or time.monotonic() < self._expunge_at:
            return False
        self._expunge_at = time.monotonic() + EXPUNGE_SECONDS  # set first: it may fail
        for space in await self._in_thread(self._tables.spaces):
            await self._in_thread(self._tables.expunge, space, timedelta(seconds=EXPUNGE_SECONDS / 2))
        self._expunge_left -= 1
        return True

    async def _take_stock(self, version: int) -> None:
        """At the first call, remove what was deleted while no catalog ran, and note the receipts to follow."""
        for space in await self._in_thread(self._tables.spaces):
            await self._remove(space, await self._in_thread(self._not_in_corpus, space), None)
            self._expunge_soon()  # an earlier catalog may have died before the bytes were gone
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
