"""The reconcile loop: every corpus row, in every resident image space.

Backfill, catch-up and dual-write are all this one loop. It continues from what is in the tables, so a kill loses what
was embedded in the last seconds, and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, Final

from core import metrics
from core.dependencies import answered, noted
from core.errors import RatchetError
from serving.catalog.coverage import CorpusIds
from serving.catalog.deletions import DeletionFollower
from serving.catalog.embedding import Corpus, Embedder, Encode, Pixels
from serving.catalog.space_fill import SpaceFill
from serving.catalog.tables import Tables
from serving.catalog.waking import wait_for_wake
from serving.releases.release_snapshot import ReleaseSnapshot

log = logging.getLogger("ratchet.catalog")
IDLE_SECONDS: Final = 0.5
BACKGROUND_CALLS = 16
"""Chunks that are embedded at once, over all encoders, at most."""


class Reconciler:
    """Brings the tables of the resident spaces to the corpus. Use from one event loop."""

    def __init__(self, tables: Tables, corpus: Corpus, pixels: Pixels, encode: Encode) -> None:
        self.ids = CorpusIds()
        self.fills: dict[str, SpaceFill] = {}
        """The resident spaces."""
        self.live_space = ""
        self.embedder = Embedder(corpus, pixels, encode, BACKGROUND_CALLS)
        self.changed = asyncio.Condition()
        """Notified when a space has become complete."""
        self.searchable_seconds: float | None = None
        self.last_error = ""
        self._tables = tables
        self._corpus = corpus
        self._io = ThreadPoolExecutor(1, "catalog")
        self._deletions = DeletionFollower(tables, corpus, self.ids, self.in_thread)
        self._version = -1
        self._offsets: dict[str, int] = {}
        self._wake = asyncio.Event()
        self._reported = (-1, "")

    def reside(self, snapshot: ReleaseSnapshot) -> SpaceFill:
        """Hold the snapshot's image space from now on."""
        fill = self.fills.get(snapshot.image_space)
        if fill is None:
            fill = SpaceFill(snapshot.image_space, snapshot.clip, self.ids, self._tables, self.in_thread)
            self.fills[snapshot.image_space] = fill
        return fill

    def release(self, space: str) -> None:
        """Hold a space no more."""
        self.fills.pop(space).cancel()

    def reopen(self, space: str) -> None:
        """Look anew at a table that cannot be read: if it is gone, it is made anew."""
        self._tables.forget(space)
        old = self.fills.pop(space, None)
        if old is not None:
            old.cancel()
            self.reside(ReleaseSnapshot(0, old.clip, space, ""))
        self.wake()

    def wake(self) -> None:
        """Something has changed: look at once."""
        self._wake.set()

    def spaces(self) -> dict[str, bool]:
        """The resident spaces, the live one first, and whether each has (or had) every row."""
        return {fill.space: fill.complete >= 0 for fill in self._ordered()}

    def complete(self) -> set[str]:
        """The resident spaces that have, or had, every row."""
        return {fill.space for fill in self.fills.values() if fill.complete >= 0}

    def prefer(self, space: str, samples: Collection[str]) -> None:
        """Embed these first for a space."""
        if samples and (fill := self.fills.get(space)) is not None:
            fill.coverage.prefer(self.ids.numbers(samples))

    async def run(self) -> None:
        """Reconcile for ever. A failure (store away, encoder restarting) is logged and tried again."""
        try:
            await self._run()
        finally:
            for fill in self.fills.values():
                fill.cancel()

    async def in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call something in the one thread that writes tables."""
        return await asyncio.get_running_loop().run_in_executor(self._io, function, *args)

    async def step(self) -> bool:
        """Look at the corpus, keep the encoders busy, and take over what they have done. True when there was work."""
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
        for fill in fills:
            await self._mark_complete(fill, version)
        if worked or self._reported != (version, self.live_space):
            self._report()
            self._reported = (version, self.live_space)
        self.last_error = str(errors[0])[:300] if errors else ""
        if errors:
            raise errors[0]
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
        """Start chunks as long as there is room. True when the space is not complete."""
        if fill.complete == version or self.fills.get(fill.space) is not fill:
            return False
        if not fill.loaded:
            await fill.load()
            if self.fills.get(fill.space) is not fill:
                return False
        while sum(len(each.running) for each in self.fills.values()) < self.embedder.pace.width:
            if not fill.start(self.embedder):
                break
        return not fill.is_idle

    async def _store(self, fill: SpaceFill) -> None:
        rows = await fill.store()
        if rows is not None and fill.space == self.live_space and fill.complete >= 0:  # else it is a backfill
            self._record_delays(rows["ingested_at"].to_pylist())

    async def _mark_complete(self, fill: SpaceFill, version: int) -> None:
        if fill.complete == version or not fill.loaded or not fill.is_idle or fill.coverage.missing:
            return
        fill.complete = version
        async with self.changed:
            self.changed.notify_all()

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

    async def _run(self) -> None:
        while True:
            try:
                worked = await self.step()
                answered(["store"])
            except (RatchetError, OSError, RuntimeError) as error:
                noted(error)
                log.warning("reconcile: %s", error)
                worked = False
            except Exception:
                log.exception("reconcile")
                worked = False
            if not worked:
                await wait_for_wake(self._wake, IDLE_SECONDS)
                self._wake.clear()

    def _record_delays(self, ingested: list[datetime | None]) -> None:
        """Samples became searchable under the live release."""
        for moment in ingested:
            if moment is not None:
                aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
                self.searchable_seconds = max(0.0, time.time() - aware.timestamp())
                metrics.catalog.searchable(self.searchable_seconds)

    def _ordered(self) -> list[SpaceFill]:
        """The live space first: what is searched now matters most."""
        return sorted(self.fills.values(), key=lambda fill: fill.space != self.live_space)
