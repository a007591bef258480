"""The catalog of one server: resident image spaces, searches, and the loops that maintain them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import fsspec
import numpy as np
import numpy.typing as npt

from core.dependencies import current, noted
from core.errors import RatchetError, StoreError, StoreUnavailable
from core.settings.serving import Catalog as CatalogSettings
from serving.catalog.cross_version import search_across, usable
from serving.catalog.index_maintainer import IndexMaintainer
from serving.catalog.queries import MAX_DEPTH, Filters, Found, Hit, Search
from serving.catalog.reconcile import Reconciler
from serving.catalog.space_fill import Encode, Pixels
from serving.catalog.tables import Tables
from serving.releases.types import ReleaseSnapshot
from streams.store.sample_store import SampleStore

log = logging.getLogger("ratchet.catalog")
Result = TypeVar("Result")
STALL_SECONDS: Final = 600.0
"""A release that waits for its image space fails when no row was added for this long."""
LOOK_SECONDS: Final = 1.0
SEARCH_THREADS: Final = 4
READ_SECONDS: Final = 10.0
"""Longest read for a client: an exact search reads all vectors of a space, at most 100 MB before there is an index."""
RETRY_SECONDS: Final = 5.0
"""Interval of trial reads while the store hangs."""
RENEW_SECONDS: Final = 10.0
CLAIM_SECONDS: Final = 60.0
FOLDER: Final = "claims"


class Catalog:
    """Keeps the tables of resident releases complete and searches them. Use from one event loop."""

    def __init__(
        self, tables: Tables, corpus: SampleStore, pixels: Pixels, encode: Encode,
        settings: CatalogSettings | None = None,
    ) -> None:  # fmt: skip
        self.tables = tables
        self.corpus = corpus
        self.claims = SpaceClaims(tables.url, secrets.token_hex(16))
        self.reconciler = Reconciler(tables, corpus, pixels, encode)
        self.maintainer = IndexMaintainer(tables, settings or CatalogSettings(), self.reconciler.spaces, self.sample)
        self._awaited: Counter[str] = Counter()
        """Calls that wait for a space to be complete. It is kept although the prepared release is not resident yet."""
        self.cross_version: dict[str, str] = {}
        """Incomplete spaces that may be searched by the vectors of another one, with that space."""
        self.read = _BoundedReads().call
        self._in_memory = ThreadPoolExecutor(SEARCH_THREADS, "search")
        self._live = 0
        self._claim_changed, self._index_changed = asyncio.Event(), asyncio.Event()

    async def cover(self, snapshot: ReleaseSnapshot, wait: bool = True, most_seconds: float | None = None) -> int:
        """Make a space resident and return its rows; with ``wait``, once it has every row of the corpus and its index.
        ``most_seconds``: longest wait; a space of :attr:`cross_version` may go live before it is complete. Raises
        StoreError when no row was added for :data:`STALL_SECONDS`."""
        space = snapshot.image_space
        fresh = space not in self.reconciler.fills
        self.reconciler.add_space(snapshot)
        self._residency_changed()
        if wait:
            self._awaited[space] += 1
            try:
                version = await self.reconciler.in_thread(self.corpus.version)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(most_seconds):
                        await self._wait_for(space, version)
            finally:
                self._awaited.subtract([space])
                self._awaited = +self._awaited
        elif fresh:
            log.info("image space %s is resident now", space)
        return self.reconciler.fills[space].coverage.rows

    async def adopt(self, window: Sequence[ReleaseSnapshot]) -> None:
        """Take over the resident releases, newest first; other spaces stay until :meth:`retire`. A window whose live
        release is older than the known one is late and ignored."""
        live = max((snapshot.release for snapshot in window), default=0)
        if live < self._live:
            return
        for snapshot in window:
            self.reconciler.add_space(snapshot)
        self._live = live
        self.reconciler.live_space = window[0].image_space if window else ""
        self._residency_changed()

    async def retire(self, keep: Sequence[ReleaseSnapshot], spare: Collection[str] | None = ()) -> list[str]:
        """Drop spaces that no kept release has and no call awaits. Returns those whose tables were dropped too, because
        no other server on this lake holds them. ``spare``: spaces whose tables stay, as those of proposed releases;
        None: drop no table; only the server whose controller changes what is live may drop them."""
        spaces = {snapshot.image_space: snapshot for snapshot in keep}
        for space in set(self.reconciler.fills) - set(spaces) - set(self._awaited):
            self.reconciler.remove_space(space)
        for snapshot in spaces.values():
            self.reconciler.add_space(snapshot).clip = snapshot.clip  # the adapter that made it may be gone
        self.cross_version = {new: old for new, old in self.cross_version.items() if new in self.reconciler.fills}
        gone = [] if spare is None else await self._drop_others(spare)
        await self.reconciler.in_thread(self.tables.forget_others, tuple(self.reconciler.fills))
        return gone

    async def search(self, space: str, search: Search) -> Found:
        """Search a resident space, see :meth:`Tables.search`. The first page is what a search for ``k`` rows finds. The
        others divide what a search for :data:`~serving.catalog.queries.MAX_DEPTH` rows finds beyond it: an index may
        find other rows if it searches for more, and pages of searches of different length would overlap. Raises
        StoreError when the space is not resident, StoreUnavailable when it has no index and the store does not
        answer."""
        if space not in self.reconciler.fills:
            raise StoreError(f"image space {space} has no index here.", "Use a resident release.")
        try:
            return await self._search(space, search)
        except (OSError, RuntimeError, ValueError) as error:
            self.reconciler.reopen(space)  # if its table is gone, it is made again
            raise StoreError(f"the index of image space {space} cannot be read: {error}"[:300], "Try again.") from error

    async def _search(self, space: str, search: Search) -> Found:
        samples = [query if isinstance(query, str) else "" for query in search.queries]
        own = await self.read(self.tables.vectors, space, sorted(set(filter(None, samples)))) if any(samples) else {}
        if missing := [sample for sample in samples if sample and sample not in own]:
            self.reconciler.prefer(space, missing)
            return Found([], missing=missing)
        vectors = np.stack([own[query] if isinstance(query, str) else query for query in search.queries])
        self.maintainer.searched(space, vectors)
        more = int(any(samples))  # a sample finds itself
        nearest = await self._nearest(space, vectors, search.k + more, search.filters)
        pages = [_others(hits, {sample})[: search.k] for hits, sample in zip(nearest, samples, strict=True)]
        if search.offset:
            deep = await self._nearest(space, vectors, MAX_DEPTH + more, search.filters)
            first = [{sample, *(hit.id for hit in page)} for page, sample in zip(pages, samples, strict=True)]
            rest = slice(search.offset - search.k, min(search.offset, MAX_DEPTH - search.k))
            pages = [_others(hits, seen)[rest] for hits, seen in zip(deep, first, strict=True)]
        if not search.vectors:
            return Found(pages)
        ids = sorted({hit.id for page in pages for hit in page})
        return Found(pages, await self.read(self.tables.vectors, space, ids))

    async def _nearest(self, space: str, vectors: npt.NDArray[np.float32], k: int, filters: Filters) -> list[list[Hit]]:
        old = usable(self.cross_version, space, self.reconciler.complete())
        if old is not None:
            hits, lacking = await self.read(search_across, self.tables, space, old, vectors, k, filters)
            self.reconciler.prefer(space, lacking)
            return hits
        indexed = self.tables.indexes.usable(space)
        if indexed is None:
            return await self.read(self.tables.search, space, vectors, k, filters)
        hits, lacking = await asyncio.get_running_loop().run_in_executor(
            self._in_memory, self.tables.search_index, space, *indexed, vectors, k, filters
        )
        if lacking:
            with contextlib.suppress(StoreUnavailable):  # hits without texts are better than no hits
                return await self.read(self.tables.with_texts, space, hits, lacking)
        return hits

    async def image(self, sample_id: str) -> bytes | None:
        """The encoded image of a sample, or None. Raises StoreError."""
        rows = await self.read(lambda: self.corpus.scan(columns=["id", "image"], ids=[sample_id]))
        return bytes(rows["image"][0].as_py()) if rows.num_rows else None

    def searchable(self) -> tuple[str, int]:
        fill = self.reconciler.fills.get(self.reconciler.live_space)
        return self.reconciler.live_space, fill.coverage.rows if fill is not None else 0

    def newest(self, space: str, count: int) -> list[str]:
        """The last ingested samples of a space, newest last."""
        fill = self.reconciler.fills.get(space)
        return [] if fill is None else self.reconciler.ids.names(fill.coverage.held()[-count:])

    def sample(self, space: str, count: int) -> list[str]:
        """Up to ``count`` samples, spread evenly over a space."""
        fill = self.reconciler.fills.get(space)
        held = fill.coverage.held() if fill is not None else np.empty(0, np.int64)
        return self.reconciler.ids.names(held[:: max(1, len(held) // count)][:count])

    def status(self) -> dict[str, Any]:
        """Rows, coverage, backfill and index of each resident space; unreadable images count as done."""
        spaces = {
            space: {**fill.status(), "index": self.maintainer.status(space)}
            for space, fill in self.reconciler.fills.items()
        }
        return {
            "corpus_rows": len(self.reconciler.ids),
            "coverage": min((space["coverage"] for space in spaces.values()), default=0.0),
            "spaces": spaces,
            "searchable_seconds": self.reconciler.searchable_seconds,
            "chunks_at_once": self.reconciler.embedder.pace.width,
            "trouble": self.reconciler.last_error,
            "dependencies": {name: found.state for name, found in current().items()},
        }

    async def run(self) -> None:
        """Run the loops that keep spaces, indexes and the claim current, forever."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(repeat(self._claim, self._claim_changed, RENEW_SECONDS / 2))
                tasks.create_task(repeat(self.reconciler.step, self.reconciler.woken, seconds=0.5))
                tasks.create_task(repeat(self.maintainer.step, self._index_changed, seconds=5.0))
        finally:
            for fill in self.reconciler.fills.values():
                fill.cancel()

    async def _wait_for(self, space: str, version: int) -> None:
        rows, since = -1, time.monotonic()
        while (fill := self.reconciler.fills[space]).complete < version or not self.maintainer.is_ready(
            space, fill.coverage.rows
        ):
            if fill.coverage.rows != rows or fill.complete >= version:
                rows, since = fill.coverage.rows, time.monotonic()
            elif time.monotonic() - since > STALL_SECONDS:
                raise StoreError(
                    f"the backfill of image space {space} stands still at {fill.coverage.ratio:.1%}: "
                    f"{self.reconciler.last_error or 'no chunk was embedded'}.",
                    "Look at the encoders' log; what is embedded stays, and the next try goes on from there.",
                )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS), self.reconciler.changed:
                    await self.reconciler.changed.wait()

    async def _drop_others(self, spare: Collection[str]) -> list[str]:
        stored = await self.reconciler.in_thread(self.tables.spaces)
        candidates = [space for space in stored if space not in self.reconciler.fills and space not in spare]
        held = await self.reconciler.in_thread(self.claims.claimed_by_others, candidates) if candidates else set()
        gone = [space for space in candidates if space not in held]
        for space in gone:
            await self.reconciler.in_thread(self.tables.drop, space)
        return gone

    async def _claim(self) -> bool:
        try:
            await self.read(self.claims.renew, tuple(self.reconciler.fills))
        except Exception as error:  # object-store clients raise anything
            log.warning("the claim on the image spaces could not be written: %s", error)
        return False

    def _residency_changed(self) -> None:
        for event in (self._claim_changed, self.reconciler.woken, self._index_changed):
            event.set()


def _others(hits: Sequence[Hit], ids: Collection[str]) -> list[Hit]:
    return [hit for hit in hits if hit.id not in ids]


async def repeat(step: Callable[[], Awaitable[bool]], woken: asyncio.Event, seconds: float) -> None:
    """Repeat a step forever: at once while there is work, otherwise when woken or after ``seconds``. Failures (store
    away, encoder restarting) are logged and tried again."""
    while True:
        woken.clear()
        worked = False
        try:
            worked = await step()
        except (RatchetError, OSError, RuntimeError, ValueError) as error:
            noted(error)
            log.warning("catalog: %s", error)
        except Exception:
            log.exception("catalog")
        if not worked:
            # Not asyncio.wait_for: in Python 3.11 it swallows a cancellation that arrives as its wait ends, so a loop
            # woken and cancelled together would go on forever.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await woken.wait()


class _BoundedReads:
    """Runs reads in threads with a time limit and a circuit breaker. Use from one event loop. A read of a hanging store
    ends only with Lance's own retries, minutes later, and holds its thread until then. So after one timeout other reads
    fail at once, and an occasional one tests whether the store answers again."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(SEARCH_THREADS, "read")
        self._hangs = False
        self._try_at = 0.0

    async def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call a function in a thread. Raises StoreUnavailable when the store does not answer."""
        if self._hangs:
            if time.monotonic() < self._try_at:
                raise self._unavailable()
            self._try_at = time.monotonic() + RETRY_SECONDS
        try:
            async with asyncio.timeout(READ_SECONDS) as limit:
                result = await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)
        except TimeoutError:
            if not limit.expired():
                raise
            self._hangs, self._try_at = True, time.monotonic() + RETRY_SECONDS
            raise self._unavailable() from None
        self._hangs = False
        return result

    def _unavailable(self) -> StoreUnavailable:
        return StoreUnavailable(
            f"the catalog's store does not answer within {READ_SECONDS:g} s.", "Send the request again later."
        )


class SpaceClaims:
    """Tells other servers on the same lake which tables are needed here. Use from one thread."""

    def __init__(self, url: str, holder: str, now: Callable[[], float] = time.monotonic) -> None:
        """``url``: the catalog's folder; ``holder``: hexadecimal digits unique to this process."""
        self._files, root = fsspec.core.url_to_fs(url)
        self._folder = f"{root}/{FOLDER}"
        self._name = f"{holder}.json"
        self._now = now
        self._spaces: tuple[str, ...] = ()
        self._count = 0
        self._written = -RENEW_SECONDS
        self._seen: dict[str, tuple[bytes, float]] = {}

    def renew(self, spaces: Collection[str]) -> None:
        """Claim exactly these spaces. Writes when they changed or a renewal is due."""
        claimed = tuple(sorted(spaces))
        if claimed == self._spaces and self._now() - self._written < RENEW_SECONDS:
            return
        self._files.makedirs(self._folder, exist_ok=True)
        content = json.dumps({"spaces": claimed, "count": self._count + 1}).encode()
        self._files.pipe_file(f"{self._folder}/{self._name}", content)
        self._spaces, self._count, self._written = claimed, self._count + 1, self._now()

    def claimed_by_others(self, spaces: Collection[str]) -> set[str]:
        """Those of ``spaces`` that others claim. Removes expired claims; an unreadable one counts for all spaces."""
        claimed: set[str] = set()
        seen: dict[str, tuple[bytes, float]] = {}
        for path in self._others():
            try:
                content = bytes(self._files.cat_file(path))
            except FileNotFoundError:
                continue
            before, since = self._seen.get(path, (b"", 0.0))
            seen[path] = content, since if before == content else self._now()
            if self._now() - seen[path][1] > CLAIM_SECONDS:
                self._remove(path)
                continue
            try:
                claimed.update(map(str, json.loads(content)["spaces"]))
            except (ValueError, KeyError, TypeError):  # being written, or damaged
                claimed.update(spaces)
        self._seen = seen
        return claimed.intersection(spaces)

    def close(self) -> None:
        self._remove(f"{self._folder}/{self._name}")

    def _others(self) -> list[str]:
        self._files.invalidate_cache(self._folder)
        try:
            paths = map(str, self._files.ls(self._folder, detail=False))
        except FileNotFoundError:
            return []
        return sorted(path for path in paths if path.endswith(".json") and path.rpartition("/")[2] != self._name)

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(path)
