"""The reconcile loop: every corpus row, in every resident image space.

Backfill, catch-up and dual-write are all this one loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ops import metrics
from ops.errors import RatchetError, RecordError, StoreError
from serving.catalog.claims import RENEW_SECONDS, SpaceClaims
from serving.catalog.corpus import COLUMNS, Corpus, with_text
from serving.catalog.queries import Filters, Hit
from serving.catalog.tables import Tables
from serving.releases.release_snapshot import ReleaseSnapshot

log = logging.getLogger("ratchet.catalog")
Result = TypeVar("Result")
BATCH_ROWS = 32
"""Rows of one append: 32 images are 0.4 s of encoding, so progress shows and a kill loses little."""
IDLE_SECONDS = 0.5
EXPUNGE_SECONDS = 120.0
"""After deletions, removed rows are written out after this long, and the versions that have them go after as long
again: far longer than a search takes."""
OVERLAP = timedelta(minutes=10)
"""Deletions are looked for from this long before the last one: clocks of those who delete differ."""

Pixels = Callable[[bytes], npt.NDArray[np.uint8]]
"""Encoded image to uint8 [S, S, 3]."""
Encode = Callable[[npt.NDArray[np.uint8], str | None], Awaitable[npt.NDArray[np.float32]]]
"""uint8 [n, S, S, 3] and an adapter to float32 [n, dim]."""


class Catalog:
    """Holds the tables complete for the resident releases, and searches them. Use from one event loop."""

    def __init__(self, tables: Tables, corpus: Corpus, pixels: Pixels, encode: Encode) -> None:
        self.tables = tables
        self.corpus = corpus
        self.claims = SpaceClaims(tables.url, secrets.token_hex(16))
        self._pixels = pixels
        self._encode = encode
        self._io = ThreadPoolExecutor(1, "catalog")
        self._reads = ThreadPoolExecutor(2, "search")
        self._resident: dict[str, str | None] = {}
        self._have: dict[str, set[str]] = {}
        self._bad: set[str] = set()
        self._version = -1
        self._wanted: dict[str, None] = {}  # in the order of ingestion
        self._offsets: dict[str, int] = {}
        self._complete: dict[str, int] = {}
        self._deletions = 0
        self._deleted_until = datetime.min.replace(tzinfo=UTC)
        self._followed: set[tuple[str, datetime]] = set()
        self._expunge_at = float("inf")
        self._expunge_left = 0
        self._wake = asyncio.Event()
        self._changed = asyncio.Condition()
        self._live_space = ""
        self._live = 0
        self._claimed = asyncio.Event()
        self._reported = -2
        self.searchable_seconds: float | None = None

    async def cover(self, snapshot: ReleaseSnapshot, wait: bool = True) -> int:
        """Make the space resident; with ``wait``, return when it holds every row of the corpus. Returns its rows."""
        fresh = snapshot.image_space not in self._resident
        self._resident.setdefault(snapshot.image_space, snapshot.clip)
        self._claimed.set()
        self._wake.set()
        if wait:
            target = await self._in_io(self.corpus.version)
            async with self._changed:
                await self._changed.wait_for(lambda: self._complete.get(snapshot.image_space, -1) >= target)
        elif fresh:
            log.info("image space %s is resident now", snapshot.image_space)
        return len(self._have.get(snapshot.image_space, ()))

    async def adopt(self, window: Sequence[ReleaseSnapshot]) -> None:
        """The resident releases, newest first. Spaces of others stay until :meth:`retire`. A window whose live release
        is older than the one that is known came late, and changes nothing.
        """
        live = max((snapshot.release for snapshot in window), default=0)
        if live < self._live:
            return
        for snapshot in window:
            self._resident.setdefault(snapshot.image_space, snapshot.clip)
        self._live = live
        self._live_space = window[0].image_space if window else ""
        self._reported = -2  # the rows of another space are to be told
        self._claimed.set()
        self._wake.set()

    async def retire(self, keep: Sequence[ReleaseSnapshot], drop: bool = True) -> list[str]:
        """Let go of the spaces that no kept release has.

        Args:
            drop: also drop their tables, those apart that another server on this lake holds resident. Only the one
                server may do so whose controller changes what is live.

        Returns:
            Spaces whose tables were dropped.
        """
        spaces = {snapshot.image_space: snapshot.clip for snapshot in keep}
        self._resident = spaces  # an adapter that made a kept space may be gone: take one that is kept
        for space in set(self._have) - set(spaces):
            del self._have[space]
            self._complete.pop(space, None)
        gone = await self._drop_others() if drop else []
        await self._in_io(self.tables.forget_others, tuple(self._resident))
        return gone

    async def _drop_others(self) -> list[str]:
        stored = await self._in_io(self.tables.spaces)
        candidates = [space for space in stored if space not in self._resident]
        held = await self._in_io(self.claims.claimed_by_others, candidates) if candidates else set()
        gone = [space for space in candidates if space not in held]
        for space in gone:
            await self._in_io(self.tables.drop, space)
        return gone

    async def search(self, space: str, vector: npt.NDArray[np.float32], k: int, filters: Filters) -> list[Hit]:
        """See :meth:`Tables.search`. Raises StoreError when the space is not resident."""
        if space not in self._resident:
            raise StoreError(f"image space {space} has no index here.", "Use a resident release.")
        try:
            return await self.read(self.tables.search, space, vector, k, filters)
        except (OSError, RuntimeError, ValueError) as error:
            self._reopen(space)  # if its table is gone, it is made anew
            raise StoreError(f"the index of image space {space} cannot be read: {error}"[:300], "Try again.") from error

    def _reopen(self, space: str) -> None:
        self.tables.forget(space)
        self._have.pop(space, None)
        self._complete.pop(space, None)
        self._wake.set()

    async def image(self, sample_id: str) -> bytes | None:
        """The encoded image of one sample, or None."""
        found = await self.read(lambda: self.corpus.scan(columns=["id", "image"], ids=[sample_id]))
        return bytes(found["image"][0].as_py()) if found.num_rows else None

    async def read(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call something that only reads, where the loop does not wait for it."""
        return await asyncio.get_running_loop().run_in_executor(self._reads, function, *args)

    def searchable(self) -> tuple[str, list[str]]:
        """The live image space, and the samples in its table in the order in which they were ingested."""
        have = self._have.get(self._live_space, set())
        return self._live_space, [sample for sample in self._wanted if sample in have]

    def status(self) -> dict[str, Any]:
        """Rows and coverage per resident space, 0 to 1; unreadable images count as done."""
        total = len(self._wanted)
        spaces = {
            space: {
                "rows": len(self._have.get(space, ())),
                "coverage": 1.0 if not total else min(1.0, (len(self._have.get(space, ())) + len(self._bad)) / total),
            }
            for space in self._resident
        }
        least = min((space["coverage"] for space in spaces.values()), default=0.0)
        return {
            "corpus_rows": total,
            "coverage": least,
            "spaces": spaces,
            "searchable_seconds": self.searchable_seconds,
        }

    async def run(self) -> None:
        """Reconcile for ever. A trouble (store away, encoder restarting) is logged and tried again."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._claim())
            tasks.create_task(self._reconcile())

    async def _claim(self) -> None:
        """Keep the claim on the resident spaces, whatever the reconciling waits for."""
        while True:
            self._claimed.clear()
            try:
                await self.read(self.claims.renew, tuple(self._resident))
            except Exception as error:
                log.warning("the claim on the image spaces could not be written: %s", error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._claimed.wait(), RENEW_SECONDS / 2)

    async def _reconcile(self) -> None:
        while True:
            try:
                worked = await self.step()
            except (RatchetError, OSError, RuntimeError) as error:
                log.warning("reconcile: %s", error)
                worked = False
            except Exception:
                log.exception("reconcile")
                worked = False
            if not worked:
                try:
                    await asyncio.wait_for(self._wake.wait(), IDLE_SECONDS)
                except TimeoutError:
                    continue
                finally:
                    self._wake.clear()

    async def step(self) -> bool:
        """One look and at most one batch per space. True when there was something to do."""
        version = await self._in_io(self.corpus.version)
        if version != self._version:
            seen = dict(self._offsets)
            columns = ["id", "ingested_at"]
            rows = await self._in_io(lambda: self.corpus.scan(version, after=seen, columns=columns, having="text"))
            self._wanted.update(dict.fromkeys(rows.sort_by("ingested_at")["id"].to_pylist()))
            self._offsets = await self._in_io(self.corpus.offsets, version)
            await self._follow_deletions(version)
            self._version = version
        worked = await self._expunge()
        # The live space first: what is searched now matters most.
        for space, clip in sorted(self._resident.items(), key=lambda item: item[0] != self._live_space):
            if self._complete.get(space) == version or space not in self._resident:
                continue
            have = self._have.get(space)
            if have is None:
                have = await self._in_io(self.tables.ids, space)
                if space not in self._resident:
                    continue
                self._have[space] = have
            done = have | self._bad
            missing = [sample for sample in self._wanted if sample not in done]
            if missing:
                worked = True
                await self._embed(space, clip, have, missing[:BATCH_ROWS])
            if len(missing) <= BATCH_ROWS and self._have.get(space) is have:  # not retired meanwhile
                self._complete[space] = version
                async with self._changed:
                    self._changed.notify_all()
        if worked or version != self._reported:
            self._reported = version
            status = self.status()
            rows_live = status["spaces"].get(self._live_space, {}).get("rows", 0)
            metrics.catalog.covered(rows_live, status["coverage"])
        return worked

    async def _follow_deletions(self, version: int) -> None:
        """Take out of every table on the disk, resident or not, what was deleted from the store since the last look."""
        if self._version < 0:
            await self._take_stock(version)
            return
        deletions = (await self._in_io(self.corpus.tally, version))["deleted"]
        if deletions == self._deletions:
            return
        receipts = await self._receipts(version)
        gone = {sample for sample, _ in receipts - self._followed}
        again = await self._in_io(lambda: self.corpus.scan(version, columns=["id"], ids=sorted(gone), having="text"))
        for sample in gone:
            self._wanted.pop(sample, None)
        self._wanted.update(dict.fromkeys(again["id"].to_pylist()))  # deleted, and sent again since: embedded anew
        self._bad -= gone
        for space in await self._in_io(self.tables.spaces):
            await self._remove(space, gone)
        self._deletions, self._followed = deletions, receipts
        self._deleted_until = max([self._deleted_until, *(when for _, when in receipts)])

    async def _take_stock(self, version: int) -> None:
        """At the first look: take out what was deleted while nobody followed, and note what there is to follow."""
        for space in await self._in_io(self.tables.spaces):
            await self._remove(space, (await self._in_io(self.tables.ids, space)).difference(self._wanted))
            self._expunge_soon()  # who removed rows before may have died before their bytes were gone
        self._deletions = (await self._in_io(self.corpus.tally, version))["deleted"]
        self._deleted_until = datetime.now(UTC)
        self._followed = await self._receipts(version)

    async def _receipts(self, version: int) -> set[tuple[str, datetime]]:
        rows = await self._in_io(self.corpus.deleted, version, self._deleted_until - OVERLAP)
        return set(zip(rows["id"].to_pylist(), rows["ingested_at"].to_pylist(), strict=True))

    async def _remove(self, space: str, ids: set[str]) -> None:
        have = self._have.get(space)
        here = ids if have is None else ids & have
        if not here:
            return
        await self._in_io(self.tables.remove, space, here)
        if have is not None:
            have -= here
        log.info("%d deleted samples left the catalog of %s", len(here), space)
        self._expunge_soon()

    def _expunge_soon(self) -> None:
        self._expunge_at, self._expunge_left = time.monotonic() + EXPUNGE_SECONDS, 2

    async def _expunge(self) -> bool:
        """Remove the bytes of deleted rows, once no search reads the versions that have them.

        In two passes: the first writes the rows that stay anew, the second removes the versions from before the first.
        """
        if not self._expunge_left or time.monotonic() < self._expunge_at:
            return False
        self._expunge_at = time.monotonic() + EXPUNGE_SECONDS  # also when it fails: the loop goes on meanwhile
        for space in await self._in_io(self.tables.spaces):
            await self._in_io(self.tables.expunge, space, timedelta(seconds=EXPUNGE_SECONDS / 2))
        self._expunge_left -= 1
        return True

    async def _embed(self, space: str, clip: str | None, have: set[str], ids: list[str]) -> None:
        present = await self._in_io(self.tables.present, space, ids)  # written by the catalog of another server
        have.update(present)
        absent = [sample for sample in ids if sample not in present]
        if not absent:
            return
        rows = await self._in_io(lambda: self.corpus.scan(columns=COLUMNS, ids=absent))
        good, pixels = await self._in_io(self._decode, rows)
        if good:
            taken = rows.take(good)
            vectors = await self._encode(np.stack(pixels), clip)
            if self._have.get(space) is not have:
                return  # retired meanwhile: its table is dropped, and must not come back
            await self._in_io(self.tables.merge, space, with_text(taken), vectors)
            have.update(taken["id"].to_pylist())
            if space == self._live_space and space in self._complete:  # else it is a backfill
                self._found(taken["ingested_at"].to_pylist())
        known = set(rows["id"].to_pylist())
        self._bad.update(sample for sample in absent if sample not in known)

    def _found(self, ingested: list[datetime | None]) -> None:
        """Samples became searchable under the live release."""
        for moment in ingested:
            if moment is not None:
                aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
                self.searchable_seconds = max(0.0, time.time() - aware.timestamp())
                metrics.catalog.searchable(self.searchable_seconds)

    def _decode(self, rows: pa.Table) -> tuple[list[int], list[npt.NDArray[np.uint8]]]:
        good: list[int] = []
        pixels: list[npt.NDArray[np.uint8]] = []
        for index, (sample, data) in enumerate(zip(rows["id"].to_pylist(), rows["image"], strict=True)):
            try:
                pixels.append(self._pixels(bytes(data.as_py())))
                good.append(index)
            except RecordError as error:  # ingest accepted it under other bounds; it can never be embedded
                self._bad.add(sample)
                log.warning("sample %s is left out of the catalog: %s", sample, error)
        return good, pixels

    async def _in_io(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._io, function, *args)
