"""Makes the index of each resident space, keeps it up to date, and lets it be used only while its recall is enough.

Recall is that of the ten nearest rows against exact search, for stored vectors and for the last queries of clients:
texts are far from all images in CLIP's space, so that an index which finds the neighbours of images well may find those
of texts badly.
"""

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
INDEX_ROWS: Final = 50_000
"""An image space of fewer rows is searched without an index: the exact search takes milliseconds there."""
NICE: Final = 10
"""Of the thread that makes indexes and measures them: requests come first."""
LEAST_SHARES: Final = 2
"""Parts that the memory for indexes is divided into, at least: an update of the image tower makes a second space."""
SAVE_SHARE: Final = 0.02
SAVE_SECONDS: Final = 300.0
"""An index is kept on the disk again when such a share of its rows has changed, and not more often than that."""
GROWTH: Final = 4.0
"""An index is made again when its table has this multiple of the rows that it was made of: its partitions then are
too large, and no longer where the vectors are."""
BETTER: Final = 0.07
"""The effort of searches is raised until recall is so much above the bound: it is measured on few queries."""
MEASURE_SHARE: Final = 0.02
"""Of the time that may go into measuring recall. A measurement reads the whole table once."""
RECALL_QUERIES: Final = 40
"""Stored vectors, and as many queries of clients, that recall is measured with."""
RECENT: Final = 256
"""Last queries of a space that those are drawn from."""
NEIGHBOURS: Final = 10
EXACT: Final = 3 * NEIGHBOURS
"""Neighbours that are looked for exactly: more, because of equal scores, and because rows come and go meanwhile."""
SAME: Final = 1e-5
"""Scores that differ by less are equal: rows with equal vectors may come in any order."""
RETRY_SHARE: Final = 0.1
"""An index whose recall was not enough is made again when its table has changed by this share."""


@dataclass(slots=True)
class IndexStatus:
    """The state of one space's index."""

    recent: deque[Vectors] = field(default_factory=lambda: deque(maxlen=RECENT))
    """The last queries of clients."""
    rows: int = 0
    """Of the table."""
    recall: float | None = None
    """By the last measurement, at the effort that is used or at the highest one; None: not measured yet."""
    measured_rows: int = -1
    measured_until: float = 0.0
    build_seconds: float = 0.0
    building: bool = False
    built_share: float = float("inf")
    """Memory that it might take when it was made."""
    saved_at: float = float("-inf")
    last_error: str = ""


@dataclass(frozen=True, slots=True)
class RecallQuestion:
    """Queries [n, dim] under one condition, with the exact neighbours of each."""

    vectors: Vectors
    filters: Filters
    exact: Sequence[Neighbours]


class IndexMaintainer:
    """Looks at one space after the other. Use from one event loop; indexes are made in a thread of its own."""

    def __init__(
        self, tables: Tables, settings: CatalogSettings, spaces: Callable[[], Mapping[str, bool]],
        sample: Callable[[str, int], list[str]],
    ) -> None:  # fmt: skip
        """Args:
        spaces: the resident ones, the live one first, with whether each has every row of the corpus.
        sample: some ids of rows of a space; called in another thread.
        """
        self.tables = tables
        self.settings = settings
        self._spaces = spaces
        self._sample = sample
        self._known: dict[str, IndexStatus] = {}
        self._thread = ThreadPoolExecutor(1, "catalog-index", initializer=nice_thread, initargs=(NICE,))
        self._random = np.random.default_rng(0)

    def searched(self, space: str, vector: Vectors) -> None:
        if (known := self._known.get(space)) is not None:
            known.recent.append(np.asarray(vector, np.float32))

    def is_ready(self, space: str, rows: int) -> bool:
        """True when a space of so many rows is searched as fast as it is going to be."""
        if rows < INDEX_ROWS:
            return True
        known = self._known.get(space, IndexStatus())
        return not known.building and (bool(known.last_error) or known.recall is not None)

    async def step(self) -> bool:
        """One look at each space. True when an index was changed or measured."""
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
        """Of one space: rows in the index, its coding and memory, recall, and whether searches use it."""
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
        """True when an index was taken from the disk."""
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
        """Bytes of memory for one space's index."""
        large = sum(each.rows >= INDEX_ROWS for each in self._known.values())
        return self.settings.cache_gib * 2**30 / max(LEAST_SHARES, large)

    async def _build(self, space: str, known: IndexStatus) -> bool:
        """False when it would take too much memory: then there is none, and searches are exact."""
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
            known.saved_at = time.monotonic()  # also when it fails: searches do not need it
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
        """The cheapest effort whose recall is well above the bound, or the highest one when that is above it; and the
        recall. None: no effort is enough.
        """
        end = index.columns.end  # rows from here on are newer than what is looked for exactly
        levels, recalls = [], []
        for question in self._questions(space):
            for level in LEVELS:
                recall = self._recall(space, index, question, Effort(level, level), end)
                if recall >= min(1.0, self.settings.min_recall + BETTER):
                    break
            levels.append(level)
            recalls.append(recall)
        return (Effort(*levels) if min(recalls) >= self.settings.min_recall else None), min(recalls)

    def _questions(self, space: str) -> tuple[RecallQuestion, RecallQuestion]:
        """Stored vectors and clients' queries; and stored vectors among those of the same domain."""
        stored = self.tables.vectors(space, self._sample(space, RECALL_QUERIES))
        recent = list(self._known[space].recent) if space in self._known else []
        drawn = (recent[index] for index in self._random.permutation(len(recent))[:RECALL_QUERIES])
        queries = np.concatenate([stored, *(query[None] for query in drawn if len(query) == stored.shape[1])])
        nearest = self.tables.search(space, stored[0], 1, Filters()) if len(stored) else []
        domain = next((hit.domain for hit in nearest), "")
        few = stored[: RECALL_QUERIES // 2 if domain else 0]
        conditions = (queries, Filters()), (few, as_filters(domain=[domain]))
        plain, filtered = (
            RecallQuestion(vectors, filters, self.tables.nearest(space, vectors, EXACT, filters))
            for vectors, filters in conditions
        )
        return plain, filtered

    def _recall(self, space: str, index: MemoryIndex, question: RecallQuestion, effort: Effort, end: int) -> float:
        """Of the rows at positions below ``end``; 1 when there is nothing to find."""
        recalls = []
        for vector, exact in zip(question.vectors, question.exact, strict=True):
            hits, _ = self.tables.search_index(space, index, effort, vector, NEIGHBOURS, question.filters)
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
    """Share of the nearest rows that were found: a hit is right when its exact score is that of the last of them, or
    better. The score that comes with it does not count: an index rounds it.

    Args:
        keys: of the hits.
        newer: further hits, that were not there when the neighbours were looked for.
    """
    count = min(NEIGHBOURS - newer, len(exact.scores))
    if count <= 0:
        return 1.0
    right = exact.keys[exact.scores >= exact.scores[count - 1] - SAME]
    return float(np.isin(keys[:count], right).sum()) / count
