"""What the ingress processes see of a release that is watched: counts, which add up over processes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields

from core.ledger.rows import Family


@dataclass(slots=True)
class RequestCounts:
    """Requests that a release answered, and those of them that failed through no fault of the client."""

    requests: int = 0
    failed: int = 0

    def add(self, other: RequestCounts) -> None:
        """Count those of another process too."""
        self.requests += other.requests
        self.failed += other.failed


@dataclass(slots=True)
class ComparisonCounts:
    """Inputs of one model that the watched release and its incumbent both were given, unseen by clients."""

    inputs: int = 0
    """That both answered."""
    agreed: int = 0
    timed: int = 0
    slower: int = 0
    """Took longer than ``rollout.max_latency_ratio`` allows, of the timed ones."""
    tried: int = 0
    """Comparisons begun: several inputs may be one."""
    failed: int = 0
    """That the watched release could not answer."""
    incumbent_failed: int = 0
    dropped: int = 0
    """Not begun, because there was no room: clients come first."""

    def add(self, other: ComparisonCounts) -> None:
        """Count those of another process too."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass(slots=True)
class Observations:
    """Of one ingress, or of all of them. ``release`` is the one that is watched; 0: none."""

    release: int = 0
    requests: dict[int, RequestCounts] = field(default_factory=dict)
    """By release number: the resident ones."""
    compared: dict[Family, ComparisonCounts] = field(default_factory=dict)


def together(release: int, seen: Iterable[Observations]) -> Observations:
    """The sum over processes. Comparisons of another release than ``release`` (a late process's) are left out."""
    total = Observations(release)
    for one in seen:
        for number, answered in one.requests.items():
            total.requests.setdefault(number, RequestCounts()).add(answered)
        if one.release == release:
            for family, compared in one.compared.items():
                total.compared.setdefault(family, ComparisonCounts()).add(compared)
    return total
