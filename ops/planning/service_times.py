"""How long a batch takes, from rates of a closed loop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from ops.planning.measured import Cell, Kind


@dataclass(frozen=True)
class ServiceTimes:
    """Seconds of a batch of one kind: ``first + inputs * each + requests * request``."""

    first: float
    each: float
    request: float

    def batch(self, inputs: float, requests: float) -> float:
        """Of so many inputs that came in so many requests."""
        return self.first + inputs * self.each + requests * self.request

    def most(self, max_batch: int, items: int = 1) -> float:
        """Inputs a second where batches are full and each request has so many."""
        return max_batch / self.batch(max_batch, max_batch / items)


def fit(cells: Iterable[Cell], kind: Kind, max_batch: int) -> ServiceTimes:
    """The times that come nearest to measured rates, each relative to its own (non-negative least squares).

    A server whose clients wait for their answers works on all of them at once, as far as they fit into a batch.
    """
    rows, times = [], []
    for own, items, clients, rate in cells:
        if own != kind:
            continue
        inputs = min(items * clients, max(max_batch, items))
        seconds = inputs / rate
        rows.append(np.array([1.0, inputs, inputs / items]) / seconds)
        times.append(1.0)
    if len(rows) < 3:
        raise ValueError(f"{len(rows)} measured rates of {kind}s; 3 are needed.")
    first, each, request = nnls(np.array(rows), np.array(times))[0]
    return ServiceTimes(float(first), float(each), float(request))
