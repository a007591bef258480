"""Builds the index of each resident space, keeps it current, and enables it only while its recall is sufficient. Recall
of the ten nearest rows is measured against exact search, for stored vectors and for clients' last queries: texts are
far from all images in CLIP's space, so an index good for images may be bad for texts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from core import metrics
from core.priority import nice_thread
from core.settings.serving import Catalog as CatalogSettings
from serving.catalog.memory_index import LEVELS, Effort, IndexTooLarge, MemoryIndex
from serving.catalog.queries import Filters, as_filters
from serving.catalog.row_columns import Keys, Vectors, digests_of, keys_of
from serving.catalog.tables import Neighbours, Tables

log = logging.getLogger("ratchet.catalog")
INDEX_ROWS: Final = 256
"""Spaces with fewer rows are searched exactly: too few to train an index on."""
SMALL_ROWS: Final = 50_000
ALMOST_ALL: Final = 0.995
"""Recall that effort is raised to in spaces of fewer rows, where it costs microseconds."""
NICE: Final = 10
"""Niceness of the thread that builds and measures: requests come first."""
LEAST_SHARES: Final = 2
"""Minimum parts of the memory for indexes: an update of the image tower makes a second space."""
SAVE_SHARE: Final = 0.02
SAVE_SECONDS: Final = 300.0
"""An index is written again when this share of its rows has changed, at most this often."""
GROWTH: Final = 4.0
"""An index is rebuilt when its table has this multiple of its rows: partitions are then too large and misplaced."""
BETTER: Final = 0.07
"""Effort is raised until recall exceeds the bound by this much, because few queries are measured."""
MEASURE_SHARE: Final = 0.02
"""Share of time spent on measuring recall. Each measurement reads the whole table."""
RECALL_QUERIES: Final = 40
"""Number of stored vectors, and of clients' queries, per measurement."""
RECENT: Final = 256
"""Last queries per space that clients' queries are drawn from."""
NEIGHBOURS: Final = 10
EXACT: Final = 3 * NEIGHBOURS
"""Exact neighbours to find: more than compared, because of ties and of rows that change meanwhile."""
SAME: Final = 1e-5
"""Scores that differ by less are equal: rows with equal vectors may come in any order."""
RETRY_SHARE: Final = 0.1
"""An index of insufficient recall is rebuilt when its table has changed by this share."""


@dataclass(slots=True)
class IndexStatus:
    recent: deque[Vectors] = field(default_factory=lambda: deque(maxlen=RECENT))
    rows: int = 0
    recall: float | None = None
    """Last measured, at the effort in use or the highest one; None: not measured yet."""
    measured_rows: int = -1
    measured_until: float = 0.0
    build_seconds: float = 0.0
    building: bool = False
    built_share: float = float("inf")
    """Memory limit at which it was built."""
    saved_at: float = float("-inf")
    last_error: str = ""


@dataclass(frozen=True, slots=True)
class RecallQuestion:
    """Queries [n, dim] under one condition, with the exact neighbours of each."""

    vectors: Vectors
    filters: Filters
    exact: Sequence[Neighbours]


class IndexMaintainer:
    """Maintains one space after the other. Use from one event loop; indexes are built in a separate thread."""

    def __init__(
        self, tables: Tables, settings: CatalogSettings, spaces: Callable[[], Mapping[str, bool]],
        sample: Callable[[str, int], list[str]],
    ) -> None:  # fmt: skip
        """``spaces``: resident, live one first, True if complete; ``sample``: row IDs, called in another thread."""
        self.tables = tables
        self.settings = settings
        self._spaces = spaces
        self._sample = sample
        self._known: dict[str, IndexStatus] = {}
        self._thread = ThreadPoolExecutor(1, "catalog-index", initializer=nice_thread, initargs=(NICE,))
        self._random = np.random.default_rng(0)

    def searched(self, space: str, vectors: Vectors) -> None:
        if (known := self._known.get(space)) is not None:
            known.recent.extend(np.asarray(vectors, np.float32))

    def is_ready(self, space: str, rows: int) -> bool:
        """True if a space of this many rows is searched as fast as it is going to be."""
        if rows < INDEX_ROWS:
            return True
        known = self._known.get(space, IndexStatus())
        return not known.building and (bool(known.last_error) or known.recall is not None)

    async def step(self) -> bool:
        spaces = self._spaces()
        self._known = {space: self._known.get(space, IndexStatus()) for space in spaces}
        worked = False
        for number, (space, complete) in enumerate(spaces.items()):
            live = number == 0
            worked |= await self._keep(space, self._known[space], complete or live)
            if live:
                self._report(space, self._known[space])
        metrics.catalog.index_memory(self.tables.indexes.bytes())
        return worked

    def status(self, space: str) -> dict[str, Any]:
        known = self._known.get(space, IndexStatus())
        held = self.tables.indexes.of(space)
        index = held.index
        return {
            "rows": 0 if index is None else index.rows,
            "coding": None if index is None else index.coding.name,
            "bytes": 0 if index is None else index.bytes,
            "recall": None if index is None else known.recall,
            "used": self.tables.indexes.usable(space) is not None,
            "effort": None if held.effort is None else str(held.effort),
            "saved": held.saved_rows >= 0,
            "building": known.building,
            "build_seconds": known.build_seconds,
            "trouble": known.last_error,
        }

    async def _keep(self, space: str, known: IndexStatus, settled: bool) -> bool:
        known.rows = await self._in_thread(self.tables.rows, space)
        if known.rows < INDEX_ROWS:
            await self._in_thread(self.tables.indexes.forget, space, True)
            return False
        changed = await self._in_thread(self._bring_up, space)
        if settled and self._is_to_be_made(space, known):
            changed |= await self._build(space, known)
        worked = await self._measure_if_due(space, known, changed) or changed
        await self._save_if_due(space, known)
        return worked

    def _bring_up(self, space: str) -> bool:
        indexes = self.tables.indexes
        if indexes.of(space).index is not None:
            indexes.follow(space)
            return False
        return indexes.load(space)

    def _is_to_be_made(self, space: str, known: IndexStatus) -> bool:
        held = self.tables.indexes.of(space)
        if (index := held.index) is None or index.columns.end >= GROWTH * held.built_rows:
            return True
        if index.bytes > (share := self._share()) and share < known.built_share:
            return True
        differs = abs(index.rows - held.built_rows) >= RETRY_SHARE * held.built_rows
        recall = 1.0 if known.recall is None else known.recall
        return differs and (index.bytes > share or recall < self.settings.min_recall)

    def _share(self) -> float:
        large = sum(each.rows >= INDEX_ROWS for each in self._known.values())
        return self.settings.cache_gib * 2**30 / max(LEAST_SHARES, large)

    async def _build(self, space: str, known: IndexStatus) -> bool:
        """Build an index. False if it would need too much memory: searches then stay exact."""
        began, share = time.monotonic(), self._share()
        known.building = True
        log.info("the index of image space %s is made of %d rows", space, known.rows)
        try:
            await self._in_thread(self.tables.indexes.build, space, share)
            known.last_error = ""
        except IndexTooLarge as error:
            known.last_error = str(error)[:300]
            log.warning("index: %s", error)
            await self._in_thread(self.tables.indexes.forget, space, True)
            return False
        except Exception as error:
            known.last_error = f"{type(error).__name__}: {error}"[:300]
            raise
        finally:
            known.building = False
        known.built_share, known.saved_at = share, float("-inf")
        known.build_seconds = time.monotonic() - began
        metrics.catalog.index_built(known.build_seconds)
        return True

    async def _save_if_due(self, space: str, known: IndexStatus) -> None:
        held = self.tables.indexes.of(space)
        if held.index is None or time.monotonic() - known.saved_at < SAVE_SECONDS:
            return
        if held.saved_rows < 0 or abs(held.index.rows - held.saved_rows) > SAVE_SHARE * held.index.rows:
            known.saved_at = time.monotonic()  # set before it can fail: searches do not need the file
            await self._in_thread(self.tables.indexes.save, space)

    async def _measure_if_due(self, space: str, known: IndexStatus, changed: bool) -> bool:
        index = self.tables.indexes.of(space).index
        if index is None:
            return False
        due = known.recall is None or (index.rows != known.measured_rows and time.monotonic() > known.measured_until)
        if not changed and not due:
            return False
        began = time.monotonic()
        known.measured_rows = index.rows
        effort, known.recall = await self._in_thread(self._choose_effort, space, index)
        self.tables.indexes.of(space).effort = effort
        if effort is None:
            log.warning("recall@10 of the index of %s is %.3f: searches are exact", space, known.recall)
        ended = time.monotonic()
        known.measured_until = ended + (ended - began) / MEASURE_SHARE
        return True

    def _choose_effort(self, space: str, index: MemoryIndex) -> tuple[Effort | None, float]:
        """The cheapest effort with recall well above the bound, or the highest if that is above it, and the recall.
        None: no effort is sufficient."""
        end = index.columns.end  # later rows are newer than the exact neighbours
        wanted = min(1.0, max(self.settings.min_recall + BETTER, ALMOST_ALL if end < SMALL_ROWS else 0.0))
        levels, recalls = [], []
        for question in self._questions(space):
            for level in LEVELS:
                recall = self._recall(space, index, question, Effort(level, level), end)
                if recall >= wanted:
                    break
            levels.append(level)
            recalls.append(recall)
        return (Effort(*levels) if min(recalls) >= self.settings.min_recall else None), min(recalls)

    def _questions(self, space: str) -> tuple[RecallQuestion, RecallQuestion]:
        """Stored vectors and clients' queries unfiltered, and stored vectors filtered by a domain."""
        known = list(self.tables.vectors(space, self._sample(space, RECALL_QUERIES)).values())
        stored = np.stack(known) if known else np.empty((0, 0), np.float32)
        recent = list(self._known[space].recent) if space in self._known else []
        drawn = (recent[index] for index in self._random.permutation(len(recent))[:RECALL_QUERIES])
        queries = np.concatenate([stored, *(query[None] for query in drawn if len(query) == stored.shape[1])])
        nearest = self.tables.search(space, stored[:1], 1, Filters()) if known else []
        domain = next((hit.domain for hits in nearest for hit in hits), "")
        few = stored[: RECALL_QUERIES // 2 if domain else 0]
        conditions = (queries, Filters()), (few, as_filters(domain=[domain]))
        plain, filtered = (
            RecallQuestion(vectors, filters, self.tables.nearest(space, vectors, EXACT, filters))
            for vectors, filters in conditions
        )
        return plain, filtered

    def _recall(self, space: str, index: MemoryIndex, question: RecallQuestion, effort: Effort, end: int) -> float:
        """Recall among rows at positions below ``end``; 1 if there is nothing to find."""
        recalls = []
        for vector, exact in zip(question.vectors, question.exact, strict=True):
            (hits,), _ = self.tables.search_index(space, index, effort, vector[None], NEIGHBOURS, question.filters)
            keys = keys_of(digests_of([hit.id for hit in hits]))
            with self.tables.indexes.of(space).writing:
                old = index.columns.positions(keys) < end
                places = index.columns.positions(exact.keys)
            known = (places >= 0) & (places < end)
            found = Neighbours(exact.scores[known], exact.keys[known])
            recalls.append(recall_of(keys[old], found, int((~old).sum())))
        return float(np.mean(recalls)) if recalls else 1.0

    def _report(self, space: str, known: IndexStatus) -> None:
        index = self.tables.indexes.of(space).index
        metrics.catalog.indexed(0 if index is None else index.rows, self.tables.indexes.usable(space) is not None)
        if known.rows < INDEX_ROWS:
            metrics.catalog.recall(1.0)  # searches are exact
        elif known.recall is not None:
            metrics.catalog.recall(known.recall)

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)


def recall_of(keys: Keys, exact: Neighbours, newer: int = 0) -> float:
    """Share of nearest rows found. A hit counts if its exact score, not the index's rounded one, is at least that of
    the last neighbour. ``keys``: of the hits; ``newer``: number of hits added after the neighbours were searched."""
    count = min(NEIGHBOURS - newer, len(exact.scores))
    if count <= 0:
        return 1.0
    right = exact.keys[exact.scores >= exact.scores[count - 1] - SAME]
    return float(np.isin(keys[:count], right).sum()) / count
