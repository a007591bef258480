"""Decides when an update begins and on which data, and when an inconclusive candidate is asked again. Such a candidate
is kept until more fresh items have arrived. Each further look is recorded as an update that is already trained, like an
import: same adapter, recipe and data, another version of the store. So nothing is lost or repeated when the updater is
killed, and each look has its own verdict and report."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from core import metrics
from core.digests import digest_json
from core.ledger import Ledger, UpdateRow, VerdictRow
from core.ledger.learning import FINISHED, TRIGGER
from core.settings import Settings
from core.settings.updates import Gate as GateSettings
from streams.store.sample_store import SampleStore
from updater.data.draw import HAVING
from updater.gate.interim_analyses import RANK_EFFICIENCY, AnalysisPlan, candidate_alpha, needed_items
from updater.gate.sample_suites import TEXT_COLUMNS, HeldOut, fresh_suites
from updater.gate.suite_items import Seal
from updater.recipes import Family, Recipe
from updater.service.trigger_checks import NewSamples, check_triggers

HISTORY = 10_000
"""Updates to search; far more than a daily budget pays for within the life of a base."""
PLENTY = 20
"""Above this multiple of the needed items, rows are not read to count independent ones. If their captions are too few,
the gate reports it."""
RECENT = 10
LOOK = re.compile(r"^(?P<first>.+)-look-(?P<number>\d+)$")
NEEDED = "gflops_needed"
"""In the cost of an update that failed because its budget did not pay for one step: the budget that would have."""
TRAINED_BY = "trained_by"
"""In the cost of a further look: the update that trained the candidate, whose cost it is."""
BY_OPERATOR = "asked by an operator"
IMPORTED = "imported"
BLAMED = "blamed"
"""In the cost of an update that repeats a rejected one: the source that it does without."""
ONLY_LOOK = "only_look"
"""In the cost of an update that is judged once, with the available items, and not kept, like an import: see
:class:`Ready`."""


@dataclass(frozen=True)
class Learned:
    updates: list[UpdateRow]
    incumbent: str | None
    """Adapter that updates begin from and are compared with (during a canary, the stable one); None is the base."""
    data_from: dict[str, int]
    """End of the data that the incumbent has learned; earlier after a rollback, and empty for an imported adapter."""
    store_version: int
    without: frozenset[str] = frozenset()
    """Distrusted sources."""

    @classmethod
    def of(cls, ledger: Ledger, store: SampleStore, family: Family) -> Learned:
        """Raises LedgerError, StoreError."""
        updates, stable = ledger.updates(HISTORY, family), ledger.stable()
        incumbent = stable.adapter(family) if stable else None
        made = next((update for update in updates if incumbent is not None and update.adapter == incumbent), None)
        without = frozenset(row.source for row in ledger.distrusted())
        return cls(updates, incumbent, dict(made.data_to) if made else {}, store.version(), without)


@dataclass(frozen=True)
class KeptCandidate:
    update: UpdateRow
    verdict: VerdictRow
    next_items: int
    needed: int
    seen: int

    @property
    def next_id(self) -> str:
        first, number = split_id(self.update.id)
        return f"{first}-look-{number + 1}"


@dataclass(frozen=True)
class FreshItems:
    items: int
    needed: int
    candidate: KeptCandidate | None

    @property
    def enough(self) -> bool:
        return self.items >= (self.needed if self.candidate is None else self.candidate.next_items)

    def __str__(self) -> str:
        count = f"{self.items:,} of {self.needed:,} fresh items"
        if self.candidate is None:
            return count
        adapter, due = self.candidate.update.adapter, self.candidate.next_items
        return f"{count}: {adapter} was inconclusive, and is asked again with {due:,}"


@dataclass(frozen=True)
class Ready:
    learned: Learned
    data_to: dict[str, int]
    new_samples: int
    trigger: str
    fresh: FreshItems
    """With fewer than needed the gate may miss a gain of ``gate.detect``."""
    once: bool
    """Judged once, with the available items: an operator asked for it now, ``updater.wait_for_items`` is off, or it
    repeats a rejected one."""
    blamed: str | None = None
    """The source that a rejected update is repeated without; it is among ``learned.without``."""


@dataclass(frozen=True)
class Reevaluate:
    candidate: KeptCandidate
    store_version: int
    fresh: FreshItems


@dataclass(frozen=True)
class Waiting:
    reason: str


def decide(
    settings: Settings, ledger: Ledger, store: SampleStore, recipe: Recipe, *, now: bool = False, retry: bool = False
) -> Ready | Reevaluate | Waiting:
    """Decide whether an update of the recipe's family begins.

    It begins with a new sample, when any of ``updater.triggers`` holds. It learns the data that the live adapter has
    not learned: everything after the update that made it. Triggers count only data after the last finished update of
    this recipe, so that rejected data is not tried forever. Only the family's own proposals block it. It waits for as
    many fresh items as the gate needs to show a gain of ``gate.detect``, but at most ``updater.max_wait_seconds`` after
    the oldest new sample. While an inconclusive candidate is kept for its next look nothing is trained, unless the
    stream brings new samples and no fresh ones. With ``updater.wait_for_items`` off it waits for no items, and no
    candidate is kept. ``now``: begin with a single new sample, whatever the gate can detect, and instead of a kept
    candidate. ``retry``: also if this recipe has tried all of it before, or a budget did not pay for a step of it.
    """
    family = recipe.family
    unreleased = waits_for_release(ledger, family)
    if unreleased is not None:
        return Waiting(unreleased)
    learned = Learned.of(ledger, store, family)
    failed, blamed = _blamed(settings, ledger, learned, recipe)
    if blamed is not None:
        retry, learned = True, replace(learned, without=learned.without | {blamed})
    version = learned.store_version
    seen = learned.data_from
    if not retry:
        finished = (each for each in learned.updates if each.state in FINISHED)
        tried = next((each.data_to for each in finished if each.recipe.get("name") == recipe.name), {})
        seen = {place: max(seen.get(place, 0), tried.get(place, 0)) for place in {*seen, *tried}}
    count = store.count(version=version, split="train", after=seen, having=HAVING[family], without=learned.without)
    fresh = fresh_items(settings, ledger, store, family, learned, halved=bool(recipe.merge.search))
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
    trigger = BY_OPERATOR if blamed is None else f"blame: {failed} failed with {blamed}"
    if not (now or retry):
        new = NewSamples(store, family, version, seen, count, _last_began(learned.updates))
        check = check_triggers(settings.updater, ledger, new)
        if not check.holds:
            return Waiting(check.text)
        if waits and not fresh.enough and new.age < settings.updater.max_wait_seconds:
            return Waiting(f"{fresh}, the oldest sample waiting for {new.age:.0f} s")
        trigger = check.text
    unaffordable = None if retry else _unaffordable(settings, learned.updates, recipe)
    if unaffordable is not None:
        return Waiting(
            f"{unaffordable.id} needed {unaffordable.cost[NEEDED]:,.1f} MAF-GFLOPs for a single step, and an update "
            f"may spend {planned_gflops(settings):,.1f}: raise budget.gflops_per_update and gflops_per_day, or change "
            "the recipe"
        )
    rate, capacity = bucket(settings)
    lacking = planned_gflops(settings) - ledger.bucket_level(time.time(), rate, capacity)
    if lacking > 0:
        return Waiting(f"the budget lacks {lacking:,.0f} MAF-GFLOPs")
    return Ready(learned, store.reached(version), count, trigger, fresh, once=not waits, blamed=blamed)


def _blamed(settings: Settings, ledger: Ledger, learned: Learned, recipe: Recipe) -> tuple[str, str | None]:
    """The newest update, and the source that it is to be repeated without, once."""
    last = learned.updates[0] if learned.updates else None
    if last is None or not settings.trust.retry_without or BLAMED in last.cost or last.state != "done":
        return "", None
    if last.incumbent != learned.incumbent or last.recipe.get("name") != recipe.name:
        return "", None
    verdict = ledger.verdict_of(last.id)
    source = None if verdict is None else suspected(verdict.summary)
    return last.id, None if source in learned.without else source


def suspected(summary: Mapping[str, Any]) -> str | None:
    """The source that an update failed for: the one that is blamed for a regression, or whose labels the base does not
    agree with, if that is one alone."""
    doubted = {row["source"] for row in summary.get("trust", ()) if row["held"]}
    if summary.get("outcome") == "inconclusive":
        return doubted.pop() or None if len(doubted) == 1 else None
    return (summary.get("blame") or {}).get("source")


# Why nothing begins


def waits_for_release(ledger: Ledger, family: Family) -> str | None:
    """Reason to train and judge nothing of a family now, because its incumbent is undecided; None to go on."""
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


def _last_began(updates: Sequence[UpdateRow]) -> datetime | None:
    """Start of the last update that a trigger or an operator began; not of a further look, an import or an upgrade."""
    began = (each.created_at for each in updates if TRIGGER in each.cost and TRAINED_BY not in each.cost)
    return next(began, None)


def _dried_up(settings: Settings, fresh: FreshItems) -> bool:
    """True if no fresh item has arrived for long since a candidate was asked: there may never be one."""
    assert fresh.candidate is not None
    age = (datetime.now(UTC) - fresh.candidate.verdict.created_at.astimezone(UTC)).total_seconds()
    return fresh.items <= fresh.candidate.seen and age >= settings.updater.max_wait_seconds


# The budget


def planned_gflops(settings: Settings) -> float:
    """Charge of one update before it trains; the unspent part is returned afterwards."""
    return min(settings.budget.gflops_per_update, settings.budget.gflops_per_day)


def bucket(settings: Settings) -> tuple[float, float]:
    """Refill in MAF-GFLOPs a second, and capacity."""
    return settings.budget.gflops_per_day / 86_400, settings.budget.gflops_per_day


def affordability(settings: Settings, family: Family, needed: float) -> dict[str, Any]:
    return {NEEDED: needed, "base": _base_name(settings, family)}


def _unaffordable(settings: Settings, updates: Sequence[UpdateRow], recipe: Recipe) -> UpdateRow | None:
    """The last update of this recipe and base, if one of its steps needed more than an update may spend now."""
    digest = digest_json(recipe.model_dump(mode="json"))
    own = (each for each in updates if each.state in FINISHED and digest_json(each.recipe) == digest)
    last = next(own, None)
    if last is None or last.cost.get("base") != _base_name(settings, recipe.family):
        return None
    return last if float(last.cost.get(NEEDED, 0.0)) > planned_gflops(settings) else None


def _base_name(settings: Settings, family: Family) -> str:
    return settings.base.clip if family == "clip" else settings.base.vlm


# Fresh items, and looks at a candidate


def fresh_items(
    settings: Settings, ledger: Ledger, store: SampleStore, family: Family, learned: Learned, *, halved: bool
) -> FreshItems:
    """Fresh items that a family's next update, or its kept candidate, waits for. ``halved``: whether the recipe
    searches for a weight on half of them: see :func:`updater.service.gate_update.tuned_on`."""
    candidate = kept_candidate(ledger, learned)
    gate = settings.gate
    needed = candidate.needed if candidate else plan(gate, ledger, family, None, halved=halved).needed
    version, after = learned.store_version, learned.data_from
    rows = store.count(version=version, split="fresh_eval", after=after, having=HAVING[family], without=learned.without)
    if rows == 0 or (candidate is None and rows > PLENTY * needed):
        return FreshItems(rows, needed, candidate)
    seal = Seal.of(settings, store, ledger.audited_data(family))
    places = tuple(sorted(after.items()))
    items = _units(store, family, version, places, seal, gate.min_items, gate.max_items, halved, learned.without)
    return FreshItems(items, needed, candidate)


@lru_cache(maxsize=8)  # called every few seconds, often for the same version
def _units(
    store: SampleStore,
    family: Family,
    version: int,
    data_from: tuple[tuple[str, int], ...],
    seal: Seal,
    min_items: int,
    max_items: int,
    halved: bool,
    without: frozenset[str],
) -> int:
    held_out = HeldOut(store, version, HAVING[family], seal, without)
    rows = held_out.rows(TEXT_COLUMNS, dict(data_from))
    suites = fresh_suites(rows, held_out, family=family, min_items=min_items, limit=max_items)
    gated = [each.half("hidden") if halved and each.divisible(min_items) else each for each in suites]
    return sum(suite.units() for suite in gated)


def kept_candidate(ledger: Ledger, learned: Learned) -> KeptCandidate | None:
    """The candidate to ask again, or None. It belongs to the newest update. A newer update ends it, as do another
    incumbent, a look with all needed items, and a guard that withdrew it."""
    update = learned.updates[0] if learned.updates else None
    if update is None or update.state != "done" or update.incumbent != learned.incumbent:
        return None
    verdict = ledger.verdict_of(update.id)
    look = verdict.summary.get("look") if verdict is not None and verdict.outcome == "inconclusive" else None
    if verdict is None or look is None or look["next"] is None or ledger.withdrawn([update.adapter]):
        return None
    others = look["items"] - look["fresh"]  # of the user's gain suites: they stay
    return KeptCandidate(update, verdict, max(0, look["next"] - others), max(0, look["needed"] - others), look["fresh"])


def split_id(update_id: str) -> tuple[str, int]:
    """The update that trained or imported a candidate, and the number of the look, from 1."""
    match = LOOK.match(update_id)
    return (match["first"], int(match["number"])) if match else (update_id, 1)


def plan(
    settings: GateSettings, ledger: Ledger, family: str, update: UpdateRow | None, *, halved: bool
) -> AnalysisPlan:
    """Plan a candidate's next look; the first look fixes the plan for all. ``update``: the look; None: of a candidate
    that will be trained. ``halved``: only half of the fresh items are asked, because a search uses the other half."""
    verdicts = ledger.looks_since_release(family)
    candidate = None if update is None else split_id(update.id)[0]
    own = [verdict.summary["look"] for verdict in verdicts if split_id(verdict.update_id)[0] == candidate]
    if own:
        first, looked_at = own[0], tuple(look["items"] for look in own)
        return AnalysisPlan(first["alpha"], first["loss_alpha"], first["needed"], looked_at, first["candidates"])
    others = len({split_id(verdict.update_id)[0] for verdict in verdicts})
    alpha = candidate_alpha(settings.alpha, others)
    needed = needed_items(
        spread(ledger.verdicts_of(family)),
        detect=settings.detect,
        alpha=alpha,
        fewest=settings.min_items,
        most=settings.max_items // (2 if halved else 1),
    )
    # An upgrade is also looked at once: further looks would be updates of the live base.
    only = update is not None and (bool(update.cost.get(ONLY_LOOK)) or ledger.base_upgrade(update.id) is not None)
    return AnalysisPlan(alpha, settings.alpha, needed, (), others, only=only)


def spread(verdicts: Sequence[VerdictRow]) -> float | None:
    """Standard deviation of one item's difference, pooled over the newest verdicts that have one; None without any. The
    larger of the statistic's and the hits', the latter converted by RANK_EFFICIENCY: ``gate.detect`` is in points that
    users see, and a gain of 3 points of recall can be less than 3 points of 1/log2(2 + rank)."""
    gains: list[Mapping[str, Any]] = [verdict.summary.get("gain") or {} for verdict in verdicts]
    measured = [gain for gain in gains if gain.get("spread") and gain["units"] > 1][:RECENT]
    units = sum(gain["units"] for gain in measured)
    if not units:
        return None
    variances = (
        max(gain["spread"] ** 2, gain["recall_spread"] ** 2 / RANK_EFFICIENCY) * gain["units"] for gain in measured
    )
    return math.sqrt(sum(variances) / units)
