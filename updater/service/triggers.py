"""When an update begins, and on which data; and when a candidate is asked again, by the fresh items that there are."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from core import metrics
from core.digests import digest_json
from core.ledger import Ledger, UpdateRow
from core.ledger.learning import FINISHED
from core.settings import Settings
from core.settings.updates import Gate as GateSettings
from streams.store.sample_store import Having, SampleStore
from updater.data.draw import HAVING
from updater.gate.held_out import TEXT_COLUMNS, HeldOut
from updater.gate.sample_suites import fresh_suites
from updater.recipes import Family, Recipe
from updater.service import kept_candidates
from updater.service.kept_candidates import KeptCandidate

HISTORY = 10_000
"""Updates that are looked through; far more than a daily budget pays for within the life of a base."""


NEEDED = "gflops_needed"
"""In the cost of an update that failed because its budget did not pay for one step: what would have."""
PLENTY = 20
"""So many times the items that an update needs are not read to be counted. Where their captions are that few, the gate
says so."""


@dataclass(frozen=True)
class Ready:
    """An update may begin."""

    store_version: int
    data_from: dict[str, int]
    data_to: dict[str, int]
    incumbent: str | None
    previous: str | None
    """Id of the newest update, so that a repeated attempt on the same data gets an id of its own."""
    new_samples: int
    fresh: FreshItems
    """With fewer than needed the gate may not see a gain of ``gate.detect``."""
    once: bool = False
    """It is judged once, with the items that there are: an operator wants it now, or ``updater.wait_for_items`` is
    off."""


@dataclass(frozen=True)
class Reevaluate:
    """A candidate that was inconclusive is asked again: enough fresh items have arrived."""

    candidate: KeptCandidate
    store_version: int
    fresh: FreshItems


@dataclass(frozen=True)
class Waiting:
    """Nothing to do yet, and why."""

    reason: str


def decide(
    settings: Settings, ledger: Ledger, store: SampleStore, recipe: Recipe, *, now: bool = False, retry: bool = False
) -> Ready | Reevaluate | Waiting:
    """Whether an update of the recipe's family begins.

    Data to learn is what the live adapter (beside a canary, the stable one) has not learned: everything after the
    update that made it that a family can learn from. The trigger counts only what came after the last finished update
    of this recipe, so that rejected data is not tried for ever. Only the family's own proposals are waited for.

    It also waits for as many fresh items as the gate needs to show a gain of ``gate.detect``; when the oldest new
    sample has waited for ``updater.max_wait_seconds``, it begins without them. While an inconclusive candidate is kept
    for its next look nothing is trained, unless the stream brings new samples and no fresh ones. With
    ``updater.wait_for_items`` off it waits for no items, and no candidate is kept.

    Args:
        now: begin with a single new sample, whatever the gate can see, and instead of a candidate that is kept.
        retry: also when all of it was tried by this recipe before, or when a budget did not pay for a step of it.
    """
    family = recipe.family
    unreleased = waits_for_release(ledger, family)
    if unreleased is not None:
        return Waiting(unreleased)
    updates = ledger.updates(HISTORY, family)
    incumbent = incumbent_of(ledger, family)
    version = store.version()
    data_from = learned(updates, incumbent)
    seen = data_from if retry else _later(data_from, _tried(updates, recipe))
    count = store.count(version=version, split="train", after=seen, having=HAVING[family])
    fresh = _fresh_items(
        settings.gate, ledger, store, updates, family=family, version=version, data_from=data_from,
        incumbent=incumbent, halved=bool(recipe.merge.search),
    )  # fmt: skip
    metrics.update.new_samples(family, count)
    metrics.update.fresh_items(family, fresh.items, fresh.needed)
    waits = settings.updater.wait_for_items and not (now or retry)
    if fresh.candidate is not None and waits:
        if fresh.enough:
            return Reevaluate(fresh.candidate, version, fresh)
        if not (_dried_up(settings, fresh) and count >= settings.updater.min_new_samples):
            return Waiting(str(fresh))
    if count == 0:
        return Waiting("there are no new samples")
    few = count < settings.updater.min_new_samples and not (now or retry)
    if few or (waits and not fresh.enough):
        age = _oldest_seconds(store, version, seen, HAVING[family])
        if age < settings.updater.max_wait_seconds:
            missing = f"{count} of {settings.updater.min_new_samples} new samples" if few else str(fresh)
            return Waiting(f"{missing}, the oldest sample waiting for {age:.0f} s")
    refused = None if retry else _unaffordable(settings, updates, recipe)
    if refused is not None:
        return Waiting(
            f"{refused.id} needed {refused.cost[NEEDED]:,.1f} MAF-GFLOPs for a single step, and an update may spend "
            f"{planned_gflops(settings):,.1f}: raise budget.gflops_per_update and gflops_per_day, or change the recipe"
        )
    lacking = missing_budget(settings, ledger)
    if lacking > 0:
        return Waiting(f"the budget lacks {lacking:,.0f} MAF-GFLOPs")
    return Ready(
        store_version=version,
        data_from=data_from,
        data_to=store.offsets(version),
        incumbent=incumbent,
        previous=updates[0].id if updates else None,
        new_samples=count,
        fresh=fresh,
        once=not waits,
    )


def fresh_of(settings: Settings, ledger: Ledger, store: SampleStore, family: Family, *, halved: bool) -> FreshItems:
    """The fresh items that a family's next update waits for, or a candidate of it that is kept.

    Args:
        halved: whether the recipe searches for a weight, on half of them.
    """
    updates = ledger.updates(HISTORY, family)
    incumbent = incumbent_of(ledger, family)
    return _fresh_items(
        settings.gate, ledger, store, updates, family=family, version=store.version(),
        data_from=learned(updates, incumbent), incumbent=incumbent, halved=halved,
    )  # fmt: skip


def _dried_up(settings: Settings, fresh: FreshItems) -> bool:
    """Whether no fresh item has come for long since a candidate was asked: there may be none any more."""
    assert fresh.candidate is not None
    age = (datetime.now(UTC) - fresh.candidate.verdict.created_at.astimezone(UTC)).total_seconds()
    return fresh.items <= fresh.candidate.seen and age >= settings.updater.max_wait_seconds


def planned_gflops(settings: Settings) -> float:
    """What one update is charged before it trains; the difference to what it spent goes back after."""
    return min(settings.budget.gflops_per_update, settings.budget.gflops_per_day)


def bucket(settings: Settings) -> tuple[float, float]:
    """Refill in MAF-GFLOPs a second, and the most that can be saved up."""
    return settings.budget.gflops_per_day / 86_400, settings.budget.gflops_per_day


def missing_budget(settings: Settings, ledger: Ledger) -> float:
    """MAF-GFLOPs that the bucket lacks for one update; 0 or less when there is enough."""
    rate, capacity = bucket(settings)
    return planned_gflops(settings) - ledger.bucket_level(time.time(), rate, capacity)


def affordability(settings: Settings, family: Family, needed: float) -> dict[str, Any]:
    """What the ledger keeps of an update whose budget did not pay for one step: none like it begins again."""
    return {NEEDED: needed, "base": _base_name(settings, family)}


def _unaffordable(settings: Settings, updates: Sequence[UpdateRow], recipe: Recipe) -> UpdateRow | None:
    """The last update of this very recipe and base, where it needed more for one step than an update may spend now."""
    digest = digest_json(recipe.model_dump(mode="json"))
    own = (each for each in updates if each.state in FINISHED and digest_json(each.recipe) == digest)
    last = next(own, None)
    if last is None or last.cost.get("base") != _base_name(settings, recipe.family):
        return None
    return last if float(last.cost.get(NEEDED, 0.0)) > planned_gflops(settings) else None


def _base_name(settings: Settings, family: Family) -> str:
    return settings.base.clip if family == "clip" else settings.base.vlm


def waits_for_release(ledger: Ledger, family: Family) -> str | None:
    """Why nothing of a family may be trained or judged now: what it is compared with is not decided."""
    own = {update.id for update in ledger.updates(HISTORY, family)}
    open_proposals = [p for p in ledger.pending_proposals() if p.update_id in own]
    if open_proposals:
        held = ledger.held()
        why = f"updates are on hold: {held.reason}" if held else "it is being prepared"
        return f"proposal {open_proposals[0].id} is not released yet ({why})"
    live, stable = ledger.live(), ledger.stable()
    if live is not None and not live.plain and stable is not None and live.adapter(family) != stable.adapter(family):
        return f"release {live.number} is on trial: an update begins from what comes of it"
    return None


def incumbent_of(ledger: Ledger, family: Family) -> str | None:
    """The adapter that updates begin from and are compared with; None is the base."""
    stable = ledger.stable()
    return stable.adapter(family) if stable else None


def learned(updates: list[UpdateRow], incumbent: str | None) -> dict[str, int]:
    """Where the data that the live adapter has learned end; after a rollback that is further back, and an imported
    adapter has learned none of it."""
    if incumbent is None:
        return {}
    return next((dict(update.data_to) for update in updates if update.adapter == incumbent), {})


def _tried(updates: list[UpdateRow], recipe: Recipe) -> dict[str, int]:
    finished = (u for u in updates if u.state in FINISHED)
    return next((dict(u.data_to) for u in finished if u.recipe.get("name") == recipe.name), {})


def _later(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {place: max(one.get(place, 0), other.get(place, 0)) for place in {*one, *other}}


def _oldest_seconds(store: SampleStore, version: int, after: dict[str, int], having: Having) -> float:
    rows = store.scan(version=version, split="train", after=after, columns=["ingested_at"], having=having)
    oldest = min((moment for moment in rows["ingested_at"].to_pylist() if moment is not None), default=None)
    return 0.0 if oldest is None else (datetime.now(UTC) - oldest.astimezone(UTC)).total_seconds()


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


def _fresh_items(
    settings: GateSettings, ledger: Ledger, store: SampleStore, updates: list[UpdateRow], *, family: Family,
    version: int, data_from: Mapping[str, int], incumbent: str | None, halved: bool,
) -> FreshItems:  # fmt: skip
    """What the gate could ask at a version of the store. Arguments as in :class:`Ready`.

    Args:
        updates: of the family, newest first.
        halved: a search looks at half of them, see :func:`updater.service.gate_update.tuned_on`.
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
