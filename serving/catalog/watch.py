"""Periodic measurements of the catalog: fragments and drift. All data comes from the live space's table, so after a
release both windows of the drift are in the new space. Both statistics compare means and variances per dimension; they
need some hundred vectors and no labels, and do not detect new words for the same pictures.

- Squared Fréchet distance between normal distributions of diagonal covariance: |μ₁-μ₂|² + Σ (σ₁-σ₂)² (Dowson and
  Landau 1982; on embeddings: Heusel et al. 2017), in units of the embedding.
- Mean shift: difference of means in standard errors (Welch 1947), root mean square over dimensions. Without drift its
  square is 1 on average, for any embedding.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from core import metrics
from core.errors import RatchetError
from core.settings.watching import Watch
from serving.catalog.catalog import Catalog

log = logging.getLogger("ratchet.catalog")
REFERENCE: Final = 4
"""Reference windows before the newest one: enough that only the newest window varies the comparison."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, and mean and variance per dimension, of a window of vectors."""

    count: int
    mean: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]

    @classmethod
    def of(cls, vectors: npt.NDArray[np.float32]) -> Moments:
        """Moments of vectors [n, dim], n at least 2."""
        wide = vectors.astype(np.float64)
        return cls(len(wide), wide.mean(axis=0), wide.var(axis=0, ddof=1))


def frechet_distance(one: Moments, other: Moments) -> float:
    """Squared Fréchet distance under diagonal covariance; 0 for equal moments."""
    spread = np.sqrt(one.variance) - np.sqrt(other.variance)
    return float(np.sum((one.mean - other.mean) ** 2) + np.sum(spread**2))


def mean_shift(one: Moments, other: Moments) -> float:
    """Root mean square over dimensions of the means' difference in standard errors; about 1 without drift. Dimensions
    without variance are ignored; 0 if there are no others."""
    error = one.variance / one.count + other.variance / other.count
    varies = error > 0
    if not varies.any():
        return 0.0
    return float(np.sqrt(np.mean((one.mean - other.mean)[varies] ** 2 / error[varies])))


class Watcher:
    """Measures a catalog when its live space or rows have changed. Use from the catalog's event loop."""

    def __init__(self, catalog: Catalog, settings: Watch) -> None:
        self.catalog = catalog
        self.settings = settings
        self._seen = ("", 0)

    async def run(self) -> None:
        """Measure forever; failures are logged and tried again."""
        while True:
            await asyncio.sleep(self.settings.seconds)
            try:
                await self.measure()
            except (RatchetError, OSError, RuntimeError, ValueError) as error:
                log.warning("the catalog could not be measured: %s", error)

    async def measure(self) -> None:
        space, rows = self.catalog.searchable()
        if not rows or (space, rows) == self._seen:
            return
        metrics.catalog.fragments(await self.catalog.read(self.catalog.tables.fragments, space))
        await self._drift(space, rows)
        self._seen = (space, rows)

    async def _drift(self, space: str, rows: int) -> None:
        window = self.settings.drift_window
        if rows < 2 * window:
            return
        newest = self.catalog.newest(space, (1 + REFERENCE) * window)
        vectors = await self.catalog.read(self.catalog.tables.vectors, space, newest)
        drawn = np.stack(list(vectors.values()))
        before, now = Moments.of(drawn[:-window]), Moments.of(drawn[-window:])
        metrics.drift.measured("image", frechet_distance(before, now), mean_shift(before, now))
