"""What a search asks for, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

import numpy as np
import numpy.typing as npt

from streams.store.conditions import is_in, moment, quoted

MAX_DEPTH: Final = 1000
"""Hits of a query over all of its pages."""


@dataclass(frozen=True, slots=True)
class Filters:
    """Conditions that every hit meets, by one of the values of each. Times are UTC; ``since`` is inclusive, ``until``
    exclusive."""

    domain: tuple[str, ...] = ()
    source: tuple[str, ...] = ()
    since: datetime | None = None
    until: datetime | None = None
    concepts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    def sql(self) -> str:
        """A DataFusion expression with quoted texts; empty without conditions."""
        named = (("domain", self.domain), ("source", self.source), ("concept", self.concepts), ("label", self.labels))
        parts = [is_in(name, map(quoted, values)) for name, values in named if values]
        if self.tags:
            parts.append(f"array_has_any(tags, make_array({', '.join(map(quoted, self.tags))}))")
        if self.since is not None:
            parts.append(f"time >= {moment(self.since)}")
        if self.until is not None:
            parts.append(f"time < {moment(self.until)}")
        return " AND ".join(parts)


@dataclass(frozen=True, slots=True)
class Hit:
    """A search result; ``score`` is the cosine similarity, and the ingress adds the ``probability`` of a match."""

    id: str
    score: float
    text: str
    domain: str
    source: str
    time: datetime | None
    probability: float | None = None


@dataclass(frozen=True, slots=True)
class Search:
    """Queries that share one release, one page and one set of conditions."""

    queries: Sequence[npt.NDArray[np.float32] | str]
    """Unit vectors [dim], or IDs of samples: their own vectors, and the samples themselves are not among the hits."""
    k: int
    """Hits of a page."""
    filters: Filters = Filters()
    offset: int = 0
    """Hits of the pages before."""
    vectors: bool = False
    """True to return the vectors of the hits."""


@dataclass(frozen=True, slots=True)
class Found:
    """The answer to a :class:`Search`."""

    hits: Sequence[Sequence[Hit]]
    """Of each query, best first."""
    vectors: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    """Unit vectors [dim] by ID, if asked for; hits without one in the space are left out."""
    missing: Sequence[str] = ()
    """Queries whose sample has no vector in the space; if there are any, nothing was searched."""


def as_filters(
    domain: Sequence[str] = (), source: Sequence[str] = (), since: datetime | None = None,
    until: datetime | None = None, concepts: Sequence[str] = (), labels: Sequence[str] = (), tags: Sequence[str] = (),
) -> Filters:  # fmt: skip
    """Filters from lists; naive times are taken as UTC."""
    return Filters(tuple(domain), tuple(source), _utc(since), _utc(until), tuple(concepts), tuple(labels), tuple(tags))


def _utc(value: datetime | None) -> datetime | None:
    return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value
