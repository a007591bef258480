"""What is measured on the catalog now and then: its index against exact search, its fragments, and drift.

Everything is read from the table of the live image space. So after a release both windows of the drift are in the new
space, and after a restart they are the same samples as before.
"""

from __future__ import annotations

import asyncio
import logging

import numpy as np

from ops import metrics
from ops.errors import RatchetError
from ops.settings import Watch
from serving.catalog.drift import Moments, frechet_distance, mean_shift
from serving.catalog.queries import Filters
from serving.catalog.reconcile import Catalog

log = logging.getLogger("ratchet.catalog")
NEIGHBOURS = 10
SAME = 1e-5
"""Scores that differ by less are equal: rows with equal vectors may come in any order."""


class Watcher:
    """Measures a catalog whenever its live space or its rows have changed. Use from the catalog's event loop."""

    def __init__(self, catalog: Catalog, settings: Watch) -> None:
        self.catalog = catalog
        self.settings = settings
        self._seen = ("", 0)
        self._random = np.random.default_rng(0)

    async def run(self) -> None:
        """Measure for ever. A trouble is logged and tried again."""
        while True:
            await asyncio.sleep(self.settings.seconds)
            try:
                await self.measure()
            except (RatchetError, OSError, RuntimeError, ValueError) as error:
                log.warning("the catalog could not be measured: %s", error)

    async def measure(self) -> None:
        """One measurement, if there is something new to measure."""
        space, ids = self.catalog.searchable()
        if not ids or (space, len(ids)) == self._seen:
            return
        metrics.catalog.fragments(await self.catalog.read(self.catalog.tables.fragments, space))
        metrics.catalog.recall(await self._recall(space, ids))
        await self._drift(space, ids)
        self._seen = (space, len(ids))

    async def _recall(self, space: str, ids: list[str]) -> float:
        """recall@10 of sampled stored vectors: what is found is right when it scores as the true tenth, or better."""
        count = min(self.settings.recall_queries, len(ids))
        asked = self._random.choice(ids, count, replace=False).tolist()
        tables, found = self.catalog.tables, []
        for vector in await self.catalog.read(tables.vectors, space, asked):
            hits = await self.catalog.read(tables.search, space, vector, NEIGHBOURS, Filters())
            exact = await self.catalog.read(tables.exact_scores, space, vector, NEIGHBOURS)
            right = sum(hit.score >= exact[-1] - SAME for hit in hits[: len(exact)])
            found.append(right / len(exact))
        return float(np.mean(found))

    async def _drift(self, space: str, ids: list[str]) -> None:
        """The newest samples against those that came right before them."""
        window = self.settings.drift_window
        if len(ids) < 2 * window:
            return
        newest = ids[-(self.settings.drift_reference + window) :]
        vectors = await self.catalog.read(self.catalog.tables.vectors, space, newest)
        before, now = Moments.of(vectors[:-window]), Moments.of(vectors[-window:])
        metrics.drift.measured("image", frechet_distance(before, now), mean_shift(before, now))
