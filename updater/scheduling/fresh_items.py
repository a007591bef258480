"""How many fresh items the gate could ask now, and how many it needs: "n of m"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from core.ledger import Ledger, UpdateRow
from core.settings.updates import Gate as GateSettings
from streams.store import SampleStore
from updater.data.draw import HAVING
from updater.gate.held_out import TEXT_COLUMNS, HeldOut
from updater.gate.sample_suites import fresh_suites
from updater.recipes import Family
from updater.scheduling import kept_candidates
from updater.scheduling.kept_candidates import KeptCandidate

PLENTY = 20
"""So many times the items that an update needs are not read to be counted. Where their captions are that few, the gate
says so."""


@dataclass(frozen=True)
class FreshItems:
    """Independent fresh items since the live adapter's data."""

    items: int
    needed: int
    candidate: KeptCandidate | None
    """The candidate that waits for them; None: the next update does."""

    @property
    def enough(self) -> bool:
        """Whether the wait is over."""
        return self.items >= (self.needed if self.candidate is None else self.candidate.next_items)

    def __str__(self) -> str:
        count = f"{self.items:,} of {self.needed:,} fresh items"
        if self.candidate is None:
            return count
        adapter, due = self.candidate.update.adapter, self.candidate.next_items
        return f"{count}: {adapter} was inconclusive, and is asked again with {due:,}"


def fresh_items(
    settings: GateSettings,
    ledger: Ledger,
    store: SampleStore,
    updates: list[UpdateRow],
    *,
    family: Family,
    version: int,
    data_from: Mapping[str, int],
    incumbent: str | None,
    halved: bool,
) -> FreshItems:
    """What the gate could ask at a version of the store. Arguments as in :class:`updater.scheduling.triggers.Ready`.

    Args:
        updates: of the family, newest first.
        halved: a search looks at half of them, see :func:`updater.loop.tuning.tuned_on`.
    """
    candidate = kept_candidates.kept_candidate(ledger, updates, incumbent)
    if candidate is not None:
        needed = candidate.needed
    else:
        needed = kept_candidates.plan(settings, ledger, family, None, halved=halved).needed
    rows = store.count(version=version, split="fresh_eval", after=dict(data_from), having=HAVING[family])
    if rows == 0 or (candidate is None and rows > PLENTY * needed):
        return FreshItems(rows, needed, candidate)
    places = tuple(sorted(data_from.items()))
    items = _units(store, family, version, places, settings.min_items, settings.max_items, halved)
    return FreshItems(items, needed, candidate)


@lru_cache(maxsize=8)  # asked every few seconds, also where no version is new
def _units(
    store: SampleStore,
    family: Family,
    version: int,
    data_from: tuple[tuple[str, int], ...],
    min_items: int,
    max_items: int,
    halved: bool,
) -> int:
    """Independent items of the fresh suites that the gate would make."""
    held_out = HeldOut(store, version, HAVING[family])
    rows = held_out.rows(TEXT_COLUMNS, dict(data_from))
    suites = fresh_suites(rows, family=family, min_items=min_items, limit=max_items, images=held_out)
    gated = [each.half("hidden") if halved and each.divisible(min_items) else each for each in suites]
    return sum(suite.units() for suite in gated)
