"""Conditions and hits of searches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from streams.store.conditions import is_in, moment, quoted


@dataclass(frozen=True, slots=True)
class Filters:
    """Conditions that every hit meets. Times are UTC; ``since`` is inclusive, ``until`` exclusive."""

    domain: tuple[str, ...] = ()
    source: tuple[str, ...] = ()
    since: datetime | None = None
    until: datetime | None = None

    def sql(self) -> str:
        """A DataFusion expression with quoted texts; empty without conditions."""
        named = (("domain", self.domain), ("source", self.source))
        parts = [is_in(name, map(quoted, values)) for name, values in named if values]
        if self.since is not None:
            parts.append(f"time >= {moment(self.since)}")
        if self.until is not None:
            parts.append(f"time < {moment(self.until)}")
        return " AND ".join(parts)


@dataclass(frozen=True, slots=True)
class Hit:
    """A search result; ``score`` is the cosine similarity."""

    id: str
    score: float
    text: str
    domain: str
    source: str
    time: datetime | None


def as_filters(
    domain: Sequence[str] = (), source: Sequence[str] = (), since: datetime | None = None, until: datetime | None = None
) -> Filters:
    """Filters from lists; naive times are taken as UTC."""
    return Filters(tuple(domain), tuple(source), _utc(since), _utc(until))


def _utc(value: datetime | None) -> datetime | None:
    return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value
