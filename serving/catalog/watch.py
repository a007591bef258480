"""Measurements of the catalog, made now and then: its fragments, and drift. Recall is the index maintainer's.

Everything is read from the table of the live image space. So after a release both windows of the drift are in the new
space, and after a restart they are the same samples as before.

Both statistics of drift compare means and variances of each dimension. They need some hundred vectors and no labels,
and they tell of another domain, another camera, a broken producer; not of new words for the same pictures.

- Fréchet distance between two normal distributions with diagonal covariance, squared: |μ₁-μ₂|² + Σ (σ₁-σ₂)². Dowson
  and Landau, "The Fréchet distance between multivariate normal distributions", 1982; on embeddings: Heusel et al.,
  "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", 2017. In units of the embedding,
  so it can be compared over time and between windows of the same sizes.
- Mean shift: the difference of the means in its standard errors (Welch, "The generalization of 'Student's' problem",
  1947), root mean square over dimensions. Without drift its square is 1 on average, whatever the embedding.
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
"""Windows of samples before the newest: enough of them that the comparison varies by the newest window alone."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Of a window of vectors: how many, and mean and variance of each dimension."""

    count: int
    mean: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]

    @classmethod
    def of(cls, vectors: npt.NDArray[np.float32]) -> Moments:
        """Of vectors [n, dim], two at least."""
        wide = vectors.astype(np.float64)
        return cls(len(wide), wide.mean(axis=0), wide.var(axis=0, ddof=1))


def frechet_distance(one: Moments, other: Moments) -> float:
    """Squared Fréchet distance under diagonal covariance; 0 for equal moments."""
    spread = np.sqrt(one.variance) - np.sqrt(other.variance)
    return float(np.sum((one.mean - other.mean) ** 2) + np.sum(spread**2))


def mean_shift(one: Moments, other: Moments) -> float:
    """Root mean square over dimensions of the means' difference in standard errors; about 1 without drift.

    Dimensions that never vary say nothing, and are left out; 0 when no dimension varies.
    """
    error = one.variance / one.count + other.variance / other.count
    varies = error > 0
    if not varies.any():
        return 0.0
    return float(np.sqrt(np.mean((one.mean - other.mean)[varies] ** 2 / error[varies])))


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
        newest = self.catalog.newest(space, (1 + REFERENCE) * window)
        vectors = await self.catalog.read(self.catalog.tables.vectors, space, newest)
        before, now = Moments.of(vectors[:-window]), Moments.of(vectors[-window:])
        metrics.drift.measured("image", frechet_distance(before, now), mean_shift(before, now))
