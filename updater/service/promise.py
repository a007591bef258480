"""What the gate promises for this installation: per candidate, per lineage of releases, and per year. Everything is
computed from the settings, the suites, the store and the ledger, for `ratchet gate promise` (docs/gate.md). Shares and
differences are from 0 to 1; nothing is created or judged.

The power of a test of a loss is that of one comparison with one look, by the normal approximation: with the standard
deviation s of one item's difference and n independent items, the standard error is s / sqrt(n).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from scipy import stats

from core.errors import GateError
from core.ledger import Ledger, VerdictRow
from core.settings import Settings
from core.settings.updates import Gate as GateSettings
from streams.store.sample_store import SampleStore
from updater.data.draw import HAVING
from updater.gate.interim_analyses import LEAST_LEVEL, PRIOR_SPREAD, needed_items
from updater.gate.sample_suites import HeldOut
from updater.gate.statistics import POWER, smallest_difference
from updater.gate.suite_items import SEALED, Seal
from updater.gate.suites import Family, Suite, load_suites
from updater.gate.verdict import MEAN
from updater.service.gate_update import learned_suites
from updater.service.learning_state import LearningState, learning_states
from updater.service.triggers import HISTORY, RECENT, Learned, split_id, spread

WINDOW_DAYS = 90.0
LEAST_DAYS = 1.0
"""Rates are extrapolated from a day at least: the first hours of an installation say little about a year."""


@dataclass(frozen=True, slots=True)
class LossTest:
    """The test that excludes a loss of `margin`, on one suite or on the mean over all of them."""

    name: str
    margin: float
    units: int
    """Independent items that candidates are judged on."""
    sealed: int
    """Independent items that only audits ask for."""
    used: int
    """Earlier judgements on these items."""
    spread: float
    power: float
    """Probability that a candidate that changed nothing passes."""
    excludes: float
    """Smallest loss that the test excludes with POWER if nothing changed."""
    audit_finds: float | None
    """Loss that an audit finds with POWER; None if it has no items for it."""

    @classmethod
    def of(
        cls, name: str, margin: float, units: int, sealed: int, used: int, spread: float, gate: GateSettings,
        audit_level: float,
    ) -> LossTest:  # fmt: skip
        power = float(stats.norm.cdf(margin * math.sqrt(units) / spread - stats.norm.isf(gate.alpha)))
        return cls(
            name=name, margin=margin, units=units, sealed=sealed, used=used, spread=spread,
            power=power if units >= gate.min_items else 0.0,
            excludes=smallest_difference(spread, units, gate.alpha),
            audit_finds=_audit_finds(spread, margin, sealed, audit_level),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class GainTest:
    candidates: int
    """Candidates since the last release, which took their shares of alpha."""
    alpha: float
    """Share of the next one."""
    fresh: int
    needed: int
    detects: float
    """Gain that `needed` items show with POWER: `gate.detect`, or more where `gate.max_items` allows fewer items."""


@dataclass(frozen=True, slots=True)
class Lineage:
    every: int
    since: int
    """Adapters released since the last audit, or ever."""
    last_release: int | None
    last_passed: bool | None
    last_at: datetime | None
    last_reason: str


@dataclass(frozen=True, slots=True)
class Year:
    days: float
    """Period that the rates are from."""
    candidates: float
    """Judged candidates per year."""
    releases: float
    rejected: float | None
    """Share of all candidates so far that were rejected; None without any."""
    alpha: float

    @property
    def harmful_at_most(self) -> float:
        """Harmful releases a year if every candidate lost exactly its margin on one suite."""
        return self.candidates * self.alpha

    @property
    def harmful_expected(self) -> float | None:
        """The same if as many candidates are harmful as were rejected so far."""
        return None if self.rejected is None else self.rejected * self.harmful_at_most


@dataclass(frozen=True, slots=True)
class Promise:
    alpha: float
    counted: bool
    """False without a store: three quarters of the items are then assumed to be judged."""
    verdicts: int
    """Verdicts that the spreads are from; without any they are PRIOR_SPREAD."""
    suites: tuple[LossTest, ...]
    mean: LossTest | None
    unread: tuple[str, ...]
    """Why suites cannot be read; nothing is judged until they can."""
    gain: GainTest
    lineage: Lineage
    year: Year


def promises(settings: Settings) -> dict[Family, Promise]:
    """The promise for each model that has a base. Raises GateError: the suites' files cannot be read; LedgerError,
    StoreError."""
    store = SampleStore(settings.lake)
    with closing(_open(settings)) as ledger:
        states = learning_states(settings, ledger, store)
        return {family: _promise(settings, ledger, store, family, state) for family, state in states.items()}


def _open(settings: Settings) -> Ledger:
    """The ledger, or an empty one in memory where SQLite would make the file."""
    return Ledger.open(settings.ledger if settings.has_ledger else "sqlite://")


def _promise(settings: Settings, ledger: Ledger, store: SampleStore, family: Family, state: LearningState) -> Promise:
    gate, verdicts = settings.gate, ledger.verdicts_of(family, limit=HISTORY)
    learned = Learned.of(ledger, store, family)
    suites, unread = _readable(settings, family)
    if counted := learned.store_version > 0:
        seal = Seal.of(settings, store, ledger.audited_data(family))  # would create a store that is not there
        units = {suite.name: suite.part("judged", seal).units() for suite in suites}
        sealed = {suite.name: suite.part("sealed", seal).units() for suite in suites}
        if learned.data_from:
            held_out = HeldOut(store, learned.store_version, HAVING[family], seal, learned.without)
            pending = held_out.rows(["id"], learned.data_from)
            memory = learned_suites(held_out, family, pending, 2 * gate.min_items)
            suites, units = [*suites, *memory], units | {suite.name: suite.units() for suite in memory}
    else:
        sealed = {suite.name: suite.units() // SEALED for suite in suites}
        units = {suite.name: suite.units() - sealed[suite.name] for suite in suites}
    audits = state.audits.rows
    references = 1 + any(row.passed for row in audits)
    asked = len(sealed) + bool(learned.data_from) + 1  # suites, sealed samples of what was learned, and the mean
    level = gate.alpha / references / asked
    used, spreads = ledger.judgements_of(family), measured_spreads(verdicts)
    tests = [
        LossTest.of(suite.name, suite.margin or gate.margin, units[suite.name], sealed.get(suite.name, 0),
                    used.get(suite.name, 0), spreads.get(suite.name, PRIOR_SPREAD), gate, level)
        for suite in suites
    ]  # fmt: skip
    last = audits[0] if audits else None
    return Promise(
        alpha=gate.alpha,
        counted=counted,
        verdicts=len(verdicts[:RECENT]),
        suites=tuple(tests),
        mean=_mean(tests, gate, level) if tests else None,
        unread=tuple(unread),
        gain=_gain(gate, verdicts, state),
        lineage=Lineage(
            state.audits.every,
            state.audits.releases,
            last.release if last else None,
            last.passed if last else None,
            last.created_at if last else None,
            str(last.summary["reasons"][0]) if last else "",
        ),
        year=_year(ledger, family, verdicts, gate.alpha),
    )


def _readable(settings: Settings, family: Family) -> tuple[list[Suite], list[str]]:
    """The retention suites whose items can be read, and why the others cannot."""
    suites, unread = [], []
    for suite in load_suites(settings.gate.suites, settings.home, family, settings.gate.max_items):
        if suite.role == "retention":
            try:
                suite.items()
                suites.append(suite)
            except GateError as error:
                unread.append(str(error))
    return suites, unread


def measured_spreads(verdicts: Sequence[VerdictRow]) -> dict[str, float]:
    """By retention suite the standard deviation of one independent item's difference, pooled over the newest verdicts:
    from the width of its interval, whose two bounds are each missed with at most the look's level."""
    variances: dict[str, list[tuple[float, int]]] = {}
    for verdict in verdicts[:RECENT]:
        level = max(verdict.summary.get("look", {}).get("loss_level", 0.0), LEAST_LEVEL)
        suites: Mapping[str, Mapping[str, Any]] = verdict.summary.get("suites", {})
        for name, suite in suites.items():
            if suite["role"] == "retention" and suite.get("units"):
                low, high = suite["ci"]
                error = (high - low) / (2.0 * float(stats.norm.isf(level)))
                variances.setdefault(name, []).append((error**2 * suite["units"], suite["units"]))
    return {
        name: math.sqrt(sum(each * units for each, units in own) / sum(units for _, units in own))
        for name, own in variances.items()
    }


def _mean(tests: Sequence[LossTest], gate: GateSettings, audit_level: float) -> LossTest:
    """The stratified test over all suites: variances add up, weighted by units."""
    units = sum(test.units for test in tests)
    spread = math.sqrt(sum(test.units * test.spread**2 for test in tests) / units)
    sealed, used = sum(test.sealed for test in tests), max(test.used for test in tests)
    return LossTest.of(MEAN, gate.mean_margin, units, sealed, used, spread, gate, audit_level)


def _audit_finds(spread: float, margin: float, units: int, level: float) -> float | None:
    """An audit fails if a loss beyond the margin is shown."""
    if units < 2:
        return None
    error = spread / math.sqrt(units)
    return float(margin + (stats.norm.isf(level) + stats.norm.ppf(POWER)) * error)


def _gain(gate: GateSettings, verdicts: Sequence[VerdictRow], state: LearningState) -> GainTest:
    plan = state.plan
    wanted = needed_items(spread(verdicts), detect=gate.detect, alpha=plan.alpha, fewest=gate.min_items)
    detects = gate.detect * math.sqrt(max(1.0, wanted / plan.needed))
    return GainTest(plan.candidates, plan.alpha, state.fresh.items, plan.needed, detects)


def _year(ledger: Ledger, family: Family, verdicts: Sequence[VerdictRow], alpha: float) -> Year:
    released = [(row.adapter(family), row.created_at.astimezone(UTC)) for row in ledger.releases(limit=1000)]
    outcomes: dict[str, VerdictRow] = {}
    for verdict in verdicts:  # newest first: the last look at a candidate decides
        outcomes.setdefault(split_id(verdict.update_id)[0], verdict)
    judged = [row.created_at.astimezone(UTC) for row in outcomes.values()]
    now = datetime.now(UTC)
    first = min([*judged, *(at for _, at in released)], default=now)
    days = min(max((now - first) / timedelta(days=1), LEAST_DAYS), WINDOW_DAYS)
    since = now - timedelta(days=days)
    rejected = [row.outcome == "rejected" for row in outcomes.values()]
    return Year(
        days=days,
        candidates=sum(at >= since for at in judged) * 365 / days,
        releases=len({adapter for adapter, at in released if adapter and at >= since}) * 365 / days,
        rejected=sum(rejected) / len(rejected) if rejected else None,
        alpha=alpha,
    )
