"""How much the images and texts of samples agree, as running quantiles by source and domain.

Agreement is the cosine similarity of a CLIP's image and text vectors. It depends on the domain and on how a source
writes, so a sample is compared with its own kind: Tukey's fence, the lower quartile minus a number of interquartile
ranges (Exploratory Data Analysis, 1977; with 1.5 of them 0.35% of normally distributed values lie below it), of its own
source, and of the other sources of its domain, for a source that errs throughout. Histograms of fixed bins hold the
values; older ones count less and less, so that memory is bounded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from streams.records.signatures import is_signed

BINS: Final = 512
"""Of cosine similarities from -1 to 1."""
ENOUGH: Final = 50
"""Values that a fence needs."""
WINDOW: Final = 20_000
"""Values of a histogram after which all count half."""
MOST: Final = 1000
"""Pairs of source and domain; those beyond are one source."""
OTHERS: Final = "*"
Kind = tuple[str, str]
"""Source and domain."""
Counts = NDArray[np.float64]


@dataclass
class Agreements:
    """Histograms [BINS] of one model, by source and domain."""

    counts: dict[Kind, Counts] = field(default_factory=dict)

    def kind(self, source: str, domain: str) -> Kind:
        known = (source, domain) in self.counts or len(self.counts) < MOST
        return (source, domain) if known else (OTHERS, OTHERS)

    def add(self, kinds: Iterable[Kind], values: Iterable[float]) -> None:
        for kind, value in zip(kinds, values, strict=True):
            own = self.counts.setdefault(self.kind(*kind), np.zeros(BINS))
            own[min(BINS - 1, max(0, int((value + 1) / 2 * BINS)))] += 1
            if own.sum() >= WINDOW:
                own /= 2

    def fences(self, kinds: Iterable[Kind], ranges: float) -> dict[Kind, float]:
        """The lowest agreement of each kind that is not held, -1 while too little is known. ``ranges``: interquartile
        ranges below the quartile. Feedback is also compared with all else: its domain is its own."""
        by_domain: dict[str, Counts] = {}
        for (_, domain), each in self.counts.items():
            by_domain[domain] = by_domain.get(domain, 0.0) + each
        every = np.sum(list(by_domain.values()), axis=0)
        found = {}
        for source, domain in kinds:
            own = self.counts.get(self.kind(source, domain), np.zeros(BINS))
            others = by_domain.get(domain, own) - own
            if others.sum() < ENOUGH and is_signed(source):
                others = every - own
            found[source, domain] = max(_fence(own, ranges), _fence(others, ranges))
        return found

    def to_json(self) -> list[list[Any]]:
        """Rows of source, domain, first bin, and the counts from it on."""
        rows = []
        for (source, domain), each in self.counts.items():
            (where,) = np.nonzero(each)
            rows.append([source, domain, int(where[0]), each[where[0] : where[-1] + 1].round(3).tolist()])
        return rows

    @classmethod
    def parse(cls, rows: Iterable[list[Any]]) -> Agreements:
        found = cls()
        for source, domain, first, counts in rows:
            each = found.counts.setdefault((source, domain), np.zeros(BINS))
            each[first : first + len(counts)] = counts
        return found


def _fence(counts: Counts, ranges: float) -> float:
    total = counts.sum()
    if total < ENOUGH:
        return -1.0
    edges = np.linspace(-1.0, 1.0, BINS + 1)
    low, high = np.interp([0.25 * total, 0.75 * total], np.concatenate([[0.0], counts.cumsum()]), edges)
    return float(low - ranges * (high - low))
