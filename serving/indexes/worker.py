"""The worker of indexes outside (``ratchet index run``): it embeds what is pending in the image spaces of the live
release, of the rollback window and of the release that is being prepared, and names the live space to clients. Each
index has two threads: one fills, the other follows releases and rollbacks within :data:`POLL_SECONDS` meanwhile. All
progress is in the index itself and in the ledger: a worker that was killed goes on anywhere."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from core.artifacts import Artifacts
from core.errors import LeaseLost, RatchetError, RecordError, StoreError
from core.ledger import Ledger
from core.ledger.indexes import INDEX_LEASE, SEARCHABLE
from core.ledger.leases import leased
from core.ledger.rows import IndexRow, IndexSpaceRow
from core.progress import progress_log
from core.recorded_adapters import fetch_recorded
from core.settings import Settings
from ratchet_client.images import open_image
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import load_base
from serving.indexes.store import IndexStore, PendingRow, Skip, open_store
from serving.releases.residency import read_residency
from streams.records.fetching import TransientFetchError
from streams.records.uris import UriFetcher

log = logging.getLogger("ratchet.indexes")
POLL_SECONDS: Final = 0.2
LEASE_SECONDS: Final = 5.0
STOP_SECONDS: Final = 10.0
PAGE_ROWS: Final = 64
"""Read, embedded and written at once; three pages are in memory."""
SWEEP_SECONDS: Final = 5.0
"""A space gives way to the next one after this long, so that new rows of the live one do not wait for a whole fill."""
COUNT_SECONDS: Final = 5.0
FETCHES: Final = 8
SAMPLE, NEIGHBOURS = 50, 10
MIN_RECALL: Final = 0.99
TIE: Final = 1e-5
"""Difference of cosines, in float32, below which rows are equally near."""
MOST_TRANSIENT: Final = 0.01
"""Share of rows whose images cannot be fetched now with which an index still becomes ready."""
Pixels = npt.NDArray[np.uint8]
Page = list[tuple[PendingRow, Future[Pixels | Skip]]]


class RowEmbedder:
    """Reads images and embeds them, for all indexes. Loads models when the first row is pending."""

    def __init__(self, settings: Settings, ledger: Ledger, rows_per_second: float = 0.0) -> None:
        self.base = load_base(settings.home, settings.base.clip)
        self._settings, self._ledger, self._rate = settings, ledger, rows_per_second
        self._artifacts, self._uris = Artifacts(settings.artifacts), UriFetcher(settings.ingest)
        self._engine: ClipEngine | None = None
        self._lock = threading.Lock()
        self._due = 0.0

    def pixels(self, image: str | bytes) -> Pixels | Skip:
        limits = self._settings.ingest
        try:
            data = self._uris.fetch(image) if isinstance(image, str) else image
            opened = open_image(data, limits.max_pixels, limits.max_image_bytes, limits.min_side)
            return self.base.preprocess.pixels(opened)
        except RecordError as error:
            return Skip(str(error)[:500], isinstance(error, TransientFetchError))

    def embed(self, pixels: Pixels, clip: str | None, space: str) -> npt.NDArray[np.float32]:
        """Vectors [n, dim] of uint8 [n, S, S, 3]. Raises RatchetError when the adapter cannot be loaded."""
        with self._lock:
            engine = self._engine = self._engine or ClipEngine.of(self._settings, self.base)
            if clip is not None and clip not in engine.resident:
                engine.load(clip, fetch_recorded(self._artifacts, self._ledger, clip))
        if engine.spaces(clip).image != space:
            raise StoreError(f"{clip or 'the base'} has the image space {engine.spaces(clip).image}, not {space}.")
        return engine.encode_images(pixels, clip)

    def keep(self, clips: Collection[str | None]) -> None:
        """Unload other adapters."""
        with self._lock:
            for clip in set(self._engine.resident if self._engine else ()).difference(clips):
                self._engine.unload(clip)  # type: ignore[union-attr]

    def pace(self, rows: int, stopping: threading.Event) -> None:
        """Wait so that no more rows pass than ``rows_per_second`` lets."""
        if self._rate:
            with self._lock:
                self._due = max(self._due, time.monotonic()) + rows / self._rate
            stopping.wait(self._due - time.monotonic())

    def needed(self) -> tuple[str, dict[str, str | None], set[str]]:
        """The image space of the newest full release (empty: there is none of this base); all needed spaces, that one
        first, each with its adapter; spaces to keep, which waiting proposals may need again."""
        base, ledger = self.base, self._ledger
        rows = read_residency(ledger, self._settings.serve.rollback_window, base.digest)
        if not rows.window:
            return "", {}, set()
        proposals = [row for row in ledger.pending_proposals() if row.family != "vlm"]
        preparing = [row.clip for row in proposals if row.state == "preparing"]
        clips = [rows.answering[-1].clip, *preparing, *rows.clips]
        adapters = [ledger.adapter(clip) for clip in {*clips, *(row.clip for row in proposals)} if clip is not None]
        spaces: dict[str | None, str] = {None: base.spaces.image}
        spaces.update({row.name: row.image_space for row in adapters if row.base == base.digest})
        needed: dict[str, str | None] = {}
        for clip in clips:
            if clip in spaces:
                needed.setdefault(spaces[clip], clip)
        waiting = {spaces[row.clip] for row in proposals if row.clip in spaces}
        return spaces[clips[0]], needed, {*needed, *waiting}


class IndexKeeper:
    """Keeps one index. :meth:`flip` and :meth:`fill` are one step each, and may run at once."""

    def __init__(
        self, row: IndexRow, ledger: Ledger, embedder: RowEmbedder, epoch: int | None = None,
        opener: Callable[[IndexRow], IndexStore] = open_store,
    ) -> None:  # fmt: skip
        self.name, self._row, self._ledger, self._embedder, self._epoch = row.name, row, ledger, embedder, epoch
        self.stopping = threading.Event()
        self._opener, self._opening = opener, threading.Lock()
        self._opened: IndexStore | None = None
        self._count_at: dict[str, float] = {}
        self._io, self._decoding = ThreadPoolExecutor(2), ThreadPoolExecutor(FETCHES)

    def flip(self) -> bool:
        """Name the live release's space to clients, if it can be searched. True if that changed."""
        live, _, _, rows = self._read()
        if live not in rows or rows[live].state not in ("ready", "retained"):
            return False
        self._store.point(live)
        self._set(live, state="live")
        return True

    def fill(self) -> bool:
        """Take each needed space a step further, and drop the others. True if there may be more to do."""
        _, needed, kept, rows = self._read()
        busy = [self._advance(space, clip, rows.get(space)) for space, clip in needed.items()]
        for space, row in rows.items():
            if kept and space not in kept and row.state not in ("live", "dropped"):
                self._store.drop(space)
                self._set(space, state="dropped", rows=0, recall=None)
        self._embedder.keep(needed.values())
        return any(busy)

    def close(self) -> None:
        self._io.shutdown(wait=False, cancel_futures=True)
        self._decoding.shutdown(wait=False, cancel_futures=True)
        if self._opened is not None:
            self._opened.close()

    @property
    def _store(self) -> IndexStore:
        with self._opening:
            self._opened = self._opened or self._opener(self._row)
            return self._opened

    def _read(self) -> tuple[str, dict[str, str | None], set[str], dict[str, IndexSpaceRow]]:
        with self._ledger.reading():
            return *self._embedder.needed(), {row.space: row for row in self._ledger.index_spaces(self.name)}

    def _set(self, space: str, **values: Any) -> None:
        self._ledger.set_index_space(self.name, space, epoch=self._epoch, **values)
        if "state" in values:
            progress_log.info(f"index {self.name}: image space {space} is {values['state']}")

    def _advance(self, space: str, clip: str | None, row: IndexSpaceRow | None) -> bool:
        if row is None or row.state == "dropped":
            self._set(space, state="planned")
        elif row.state == "planned":
            self._store.open(space, self._embedder.base.dim)
            self._set(space, state="filling")
        else:
            seen, written = self._embed_pending(space, clip)
            caught_up = seen < PAGE_ROWS  # with rows that change all the time, some are always pending
            self._count(space, force=caught_up and row.state not in SEARCHABLE)
            if not caught_up or row.state in SEARCHABLE:
                return written > 0
            if row.state == "filling":
                self._verify(space)
            else:
                self._set(space, state="ready")
        return True

    def _verify(self, space: str) -> None:
        """Make the index, and measure it by exact searches. Raises StoreError if it is not good enough yet."""
        counts, store = self._store.counts(space), self._store
        if counts.transient > MOST_TRANSIENT * counts.total:
            raise StoreError(f"{counts.transient} of {counts.total} images cannot be fetched now.", "Tried again.")
        if counts.rows + counts.skipped <= counts.total - PAGE_ROWS:
            return  # rows were added just now
        store.build(space)
        shares = []
        for vector in store.sample(space, SAMPLE):
            exact, found = (store.search(space, vector, NEIGHBOURS, exact=exact) for exact in (True, False))
            shares.append(sum(score >= exact[-1] - TIE for score in found) / len(exact))
        recall = float(np.mean(shares)) if shares else 1.0
        if recall < MIN_RECALL:
            self._set(space, recall=recall)
            raise StoreError(f"recall@{NEIGHBOURS} in {space} is {recall:.3f}, below {MIN_RECALL}.", "Tried again.")
        self._set(space, state="verified", recall=recall)

    def _embed_pending(self, space: str, clip: str | None) -> tuple[int, int]:
        """Embed pending rows for SWEEP_SECONDS: a page is read while the one before is embedded, and the one before
        that written. Returns how many rows were seen, and how many written."""
        seen, written, until = 0, 0, time.monotonic() + SWEEP_SECONDS
        reading, writing = self._io.submit(self._read_page, space, None), None
        while (page := reading.result()) and not self.stopping.is_set():
            last = time.monotonic() > until
            if not last:
                reading = self._io.submit(self._read_page, space, page[-1][0].id)
            read = [pixels.result() for _, pixels in page]
            good = [each for each in read if not isinstance(each, Skip)]
            vectors = iter(self._embedder.embed(np.stack(good), clip, space) if good else ())
            values = [each if isinstance(each, Skip) else next(vectors) for each in read]
            written += writing.result() if writing is not None else 0
            rows = [(row, value) for (row, _), value in zip(page, values, strict=True)]
            writing = self._io.submit(self._store.write, space, rows)
            seen += len(page)
            self._count(space)
            self._embedder.pace(len(page), self.stopping)
            if last:
                break
        return seen, written + (writing.result() if writing is not None else 0)

    def _read_page(self, space: str, after: str | None) -> Page:
        rows = self._store.pending(space, PAGE_ROWS, after)
        return [(row, self._decoding.submit(self._embedder.pixels, row.image)) for row in rows]

    def _count(self, space: str, force: bool = False) -> None:
        """Record progress, in at most a twentieth of the time."""
        began = time.monotonic()
        if force or began >= self._count_at.get(space, 0.0):
            counts = self._store.counts(space)
            self._set(space, rows=counts.rows, total=counts.total, skipped=counts.skipped)
            self._count_at[space] = began + max(COUNT_SECONDS, 20 * (time.monotonic() - began))


class IndexWorker:
    """Runs a keeper's two threads for each index that is not paused, until it is stopped or the lease is lost."""

    def __init__(self, ledger: Ledger, embedder: RowEmbedder, epoch: int | None) -> None:
        self._ledger, self._embedder, self._epoch = ledger, embedder, epoch
        self._running: dict[str, tuple[IndexKeeper, list[threading.Thread]]] = {}
        self._lost = threading.Event()

    def run(self, stopping: threading.Event) -> None:
        try:
            while not stopping.is_set() and not self._lost.is_set():
                try:
                    self._follow({row.name: row for row in self._ledger.indexes() if not row.paused})
                except RatchetError as error:  # the ledger is away
                    log.warning("%s", error)
                stopping.wait(POLL_SECONDS)
        finally:
            self._follow({})

    def _follow(self, wanted: dict[str, IndexRow]) -> None:
        ended = [self._running.pop(name) for name in self._running.keys() - wanted.keys()]
        for keeper, _ in ended:
            keeper.stopping.set()
        for keeper, threads in ended:
            for thread in threads:
                thread.join(STOP_SECONDS)
            keeper.close()
        for name in wanted.keys() - self._running.keys():
            keeper = IndexKeeper(wanted[name], self._ledger, self._embedder, self._epoch)
            steps = (keeper.fill, keeper.flip)
            threads = [threading.Thread(target=self._repeat, args=(keeper, step), daemon=True) for step in steps]
            self._running[name] = keeper, threads
            for thread in threads:
                thread.start()

    def _repeat(self, keeper: IndexKeeper, step: Callable[[], bool]) -> None:
        told, pause = None, POLL_SECONDS
        while not keeper.stopping.is_set():
            busy, problem = False, ""
            try:
                busy, pause = step(), POLL_SECONDS
            except LeaseLost:
                self._lost.set()
                return
            except Exception as error:
                problem = str(error) if isinstance(error, RatchetError) else f"{type(error).__name__}: {error}"[:500]
                pause = min(2 * pause, 5.0 if step == keeper.fill else POLL_SECONDS)
            if problem != told and not keeper.stopping.is_set():
                try:
                    self._ledger.set_index_problem(keeper.name, problem)
                    told = problem
                except RatchetError as error:
                    problem = str(error)
                log.log(logging.WARNING if problem else logging.INFO, "index %s: %s", keeper.name, problem or "goes on")
            if not busy:
                keeper.stopping.wait(pause)


def run_indexes(settings: Settings, ledger: Ledger, stopping: threading.Event, rows_per_second: float = 0.0) -> None:
    """Work until ``stopping``, or wait while another process does."""
    embedder, waited = RowEmbedder(settings, ledger, rows_per_second), False
    while not stopping.is_set():
        with leased(ledger, INDEX_LEASE, LEASE_SECONDS) as epoch:
            if epoch is not None:
                progress_log.info("keeping the indexes")
                IndexWorker(ledger, embedder, epoch).run(stopping)
            elif not waited:
                progress_log.info("another worker keeps the indexes; this one takes over when it ends")
        waited = True
        stopping.wait(POLL_SECONDS)
