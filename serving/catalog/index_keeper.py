"""Makes the index of each resident space, keeps it up to date, and lets it be used only while its recall is enough."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from ops import metrics
from ops.errors import RatchetError
from ops.priority import nice_thread
from ops.settings import Catalog as CatalogSettings
from serving.catalog.index_recall import NEIGHBOURS, RecallQuestion, RecentQueries, recall_of
from serving.catalog.queries import Filters, IndexChange, as_filters
from serving.catalog.tables import Tables
from serving.catalog.vector_index import EFFORTS, Effort, IndexState
from serving.catalog.waking import wait_for_wake

log = logging.getLogger("ratchet.catalog")
ChangeIndex = Callable[[str, IndexChange], None]
"""Makes or extends the index of a space; called in a thread."""
LOOK_SECONDS: Final = 5.0
NICE: Final = 10
"""Of the thread that looks at indexes and measures them: requests come first."""
TAIL_SHARE: Final = 0.02
TAIL_ROWS: Final = 4096
"""Rows that came since the index was made are indexed when there are so many, and so large a share: until then they are
searched exactly, in milliseconds."""
GROWTH: Final = 4.0
"""An index is made anew when its table has this multiple of the rows that it was made of: its partitions then are
too large, and no longer where the vectors are."""
BETTER: Final = 0.05
"""The effort of searches is raised until recall is so much above the bound: it is measured on few queries."""
MEASURE_SHARE: Final = 0.02
"""Of the time that may go into measuring recall. A measurement reads the whole table once."""
RECALL_QUERIES: Final = 40
"""Stored vectors, and as many queries of clients, that recall is measured with."""
RETRY_SHARE: Final = 0.1
"""An index whose recall was not enough is made anew when its table has changed by this share."""


@dataclass(slots=True)
class SpaceIndex:
    """What is known of one space's index."""

    state: IndexState = field(default_factory=lambda: IndexState(0, 0, 0))
    built_rows: int = 0
    """Rows of the table when the index was made, as far as this process knows."""
    recall: float | None = None
    """By the last measurement, at the effort that is used or at the highest one; None: not measured yet."""
    measured_rows: int = -1
    measured_until: float = 0.0
    measure_seconds: float = 0.0
    build_seconds: float = 0.0
    building: bool = False
    trouble: str = ""


class IndexKeeper:
    """Looks at one space after the other. Use from one event loop; indexes are made in a thread of its own."""

    def __init__(
        self, tables: Tables, settings: CatalogSettings, spaces: Callable[[], Mapping[str, bool]],
        sample: Callable[[str, int], list[str]], change: ChangeIndex | None = None,
    ) -> None:  # fmt: skip
        """Args:
        spaces: the resident ones, the live one first, with whether each has every row of the corpus.
        sample: some ids of rows of a space; called in another thread.
        change: makes and extends indexes; by default in this process.
        """
        self.tables = tables
        self.settings = settings
        self.recent = RecentQueries()
        self._spaces = spaces
        self._sample = sample
        self._change = change or self._change_here
        self._known: dict[str, SpaceIndex] = {}
        self._thread = ThreadPoolExecutor(1, "catalog-index", initializer=nice_thread, initargs=(NICE,))
        self._random = np.random.default_rng(0)
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Keep the indexes for ever. What fails is logged and tried again."""
        while True:
            try:
                worked = await self.step()
            except (RatchetError, OSError, RuntimeError, ValueError) as error:
                log.warning("index: %s", error)
                worked = False
            except Exception:
                log.exception("index")
                worked = False
            if not worked:
                await wait_for_wake(self._wake, LOOK_SECONDS)
            self._wake.clear()

    def wake(self) -> None:
        """Look at once: a space is resident that was not."""
        self._wake.set()

    def is_ready(self, space: str, rows: int) -> bool:
        """Whether a space of so many rows is searched as fast as it is going to be."""
        if rows < self.settings.index_rows:
            return True
        known = self._known.get(space, SpaceIndex())
        return not known.building and (bool(known.trouble) or known.recall is not None)

    async def step(self) -> bool:
        """One look at each space. True when an index was changed or measured."""
        spaces = self._spaces()
        self._known = {space: self._known.get(space, SpaceIndex()) for space in spaces}
        self.recent.forget_others(list(spaces))
        worked = False
        for number, (space, complete) in enumerate(spaces.items()):
            live = number == 0
            worked |= await self._keep(space, self._known[space], complete or live)
            if live:
                self._report(space, self._known[space])
        return worked

    def status(self, space: str) -> dict[str, Any]:
        """Of one space: rows in the index, recall, and whether searches use it."""
        known = self._known.get(space, SpaceIndex())
        return {
            "rows": known.state.indexed,
            "unindexed": known.state.unindexed,
            "recall": known.recall if known.state.exists else None,
            "used": self.tables.effort(space) is not None,
            "building": known.building,
            "build_seconds": known.build_seconds,
            "trouble": known.trouble,
        }

    async def _keep(self, space: str, known: SpaceIndex, settled: bool) -> bool:
        known.state = state = await self._in_thread(self.tables.index_state, space)
        if state.rows < self.settings.index_rows:
            self.tables.use_index(space, None)
            return False
        known.built_rows = known.built_rows or state.indexed
        changed = True
        if settled and (not state.exists or self._is_outgrown(known) or self._is_to_be_remade(known)):
            await self._build(space, known)
        elif state.exists and state.unindexed >= max(TAIL_ROWS, TAIL_SHARE * state.rows):
            await self._in_thread(self._change_index, space, "extend")
        else:
            changed = False
        if changed:
            known.state = await self._in_thread(self.tables.index_state, space)
        return await self._measure_if_due(space, known, changed) or changed

    def _is_outgrown(self, known: SpaceIndex) -> bool:
        return known.state.rows >= GROWTH * known.built_rows

    def _is_to_be_remade(self, known: SpaceIndex) -> bool:
        if known.recall is None or known.recall >= self.settings.min_recall:
            return False
        return abs(known.state.rows - known.built_rows) >= RETRY_SHARE * known.built_rows

    async def _build(self, space: str, known: SpaceIndex) -> None:
        began = time.monotonic()
        known.building = True
        log.info("the index of image space %s is made of %d rows", space, known.state.rows)
        try:
            await self._in_thread(self._change_index, space, "build")
            known.trouble = ""
        except Exception as error:
            known.trouble = f"{type(error).__name__}: {error}"[:300]
            raise
        finally:
            known.building = False
        known.built_rows = known.state.rows
        known.build_seconds = time.monotonic() - began
        metrics.catalog.index_built(known.build_seconds)

    async def _measure_if_due(self, space: str, known: SpaceIndex, changed: bool) -> bool:
        if not known.state.exists:
            return False
        differs = known.state.rows != known.measured_rows
        if not changed and not (known.recall is None or (differs and time.monotonic() > known.measured_until)):
            return False
        began = time.monotonic()
        effort, known.recall = await self._in_thread(self._choose_effort, space)
        self.tables.use_index(space, effort)
        if effort is None:
            log.warning("recall@10 of the index of %s is %.3f: searches are exact", space, known.recall)
        known.measured_rows = known.state.rows
        known.measure_seconds = time.monotonic() - began
        known.measured_until = time.monotonic() + known.measure_seconds / MEASURE_SHARE
        return True

    def _choose_effort(self, space: str) -> tuple[Effort | None, float]:
        """The cheapest effort whose recall is well above the bound, or the highest one when that is above it; and the
        recall. None: no effort is enough.
        """
        questions = self._questions(space)
        recall, chosen = 0.0, EFFORTS[-1]
        for effort in EFFORTS:
            recall, chosen = self._recall(space, questions, effort), effort
            if recall >= min(1.0, self.settings.min_recall + BETTER):
                break
        return (chosen if recall >= self.settings.min_recall else None), recall

    def _questions(self, space: str) -> list[RecallQuestion]:
        """Stored vectors and clients' queries; and stored vectors among those of the same domain."""
        count = RECALL_QUERIES
        stored = self.tables.vectors(space, self._sample(space, count))
        if not len(stored):
            return []
        recent = self.recent.sample(space, count, self._random)
        plain = np.concatenate([stored, *(query[None] for query in recent if len(query) == stored.shape[1])])
        questions = [self._question(space, plain, Filters())]
        domain = next((hit.domain for hit in self.tables.search(space, stored[0], 1, Filters())), "")
        if domain:
            questions.append(self._question(space, stored[: max(1, count // 2)], as_filters(domain=[domain])))
        return questions

    def _question(self, space: str, vectors: Any, filters: Filters) -> RecallQuestion:
        return RecallQuestion(vectors, filters, self.tables.exact_scores(space, vectors, NEIGHBOURS, filters))

    def _recall(self, space: str, questions: list[RecallQuestion], effort: Effort) -> float:
        """The least over the conditions."""
        means = [
            float(
                np.mean(
                    [
                        recall_of(self.tables.search_with(space, vector, NEIGHBOURS, each.filters, effort), exact)
                        for vector, exact in zip(each.vectors, each.exact, strict=True)
                    ]
                )
            )
            for each in questions
        ]
        return min(means, default=1.0)

    def _change_index(self, space: str, change: IndexChange) -> None:
        with self.tables.stable_files(space):
            self._change(space, change)

    def _change_here(self, space: str, change: IndexChange) -> None:
        self.tables.change_index(space, change)

    def _report(self, space: str, known: SpaceIndex) -> None:
        metrics.catalog.indexed(known.state.indexed, known.state.unindexed, self.tables.effort(space) is not None)
        if known.state.rows < self.settings.index_rows:
            metrics.catalog.recall(1.0)  # searches are exact
        elif known.recall is not None:
            metrics.catalog.recall(known.recall)

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)
