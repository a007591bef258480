"""What is measured on the catalog now and then: its fragments, and drift. Recall is the index maintainer's.

Everything is read from the table of the live image space. So after a release both windows of the drift are in the new
space, and after a restart they are the same samples as before.
"""

from __future__ import annotations

import asyncio
import logging

from core import metrics
from core.errors import RatchetError
from core.settings.watching import Watch
from serving.catalog.catalog import Catalog
from serving.catalog.drift import Moments, frechet_distance, mean_shift

log = logging.getLogger("ratchet.catalog")


class Watcher:
    """Measures a catalog whenever its live space or its rows have changed. Use from the catalog's event loop."""

    def __init__(self, catalog: Catalog, settings: Watch) -> None:
        self.catalog = catalog
        self.settings = settings
        self._seen = ("", 0)

    async def run(self) -> None:
        """Measure for ever. A failure is logged and tried again."""
        while True:
            await asyncio.sleep(self.settings.seconds)
            try:
                await self.measure()
            except (RatchetError, OSError, RuntimeError, ValueError) as error:
                log.warning("the catalog could not be measured: %s", error)

    async def measure(self) -> None:
        """One measurement, if there is something new to measure."""
        space, rows = self.catalog.searchable()
        if not rows or (space, rows) == self._seen:
            return
        metrics.catalog.fragments(await self.catalog.read(self.catalog.tables.fragments, space))
        await self._drift(space, rows)
        self._seen = (space, rows)

    async def _drift(self, space: str, rows: int) -> None:
        """The newest samples against those that came right before them."""
        window = self.settings.drift_window
        if rows < 2 * window:
            return
        newest = self.catalog.newest(space, self.settings.drift_reference + window)
        vectors = await self.catalog.read(self.catalog.tables.vectors, space, newest)
        before, now = Moments.of(vectors[:-window]), Moments.of(vectors[-window:])
        metrics.drift.measured("image", frechet_distance(before, now), mean_shift(before, now))
