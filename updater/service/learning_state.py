"""The state of learning: fresh items and alpha of each model, what is missing to judge an update, and gauges from the
ledger. Metrics of verdicts and costs come from the ledger, so that they survive restarts of the updater and include
other processes (`ratchet trainer --once`)."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from core import metrics
from core.errors import ConfigError, GateError, RatchetError, RecordError
from core.ledger import Ledger, ReleaseAuditRow, VerdictRow
from core.metrics.learning import Score
from core.settings import Settings
from core.settings.serving import SHIPPED, SHIPPED_VLM
from serving.engines.clip_base import names_by_digest
from streams.store.sample_store import SampleStore
from updater.bases import families_with_a_base, need_reference
from updater.gate.interim_analyses import AnalysisPlan, alpha_left
from updater.gate.suites import MAKE_SUITES, load_suites
from updater.recipes import Family, family_recipe
from updater.service import triggers
from updater.service.triggers import FreshItems, Learned

VERDICTS = 500
AUDITS = 20


@dataclass(frozen=True)
class AuditState:
    """The audits of a family's releases on the present base."""

    rows: tuple[ReleaseAuditRow, ...]
    """The newest, newest first."""
    failed: ReleaseAuditRow | None
    """The newest one, if it failed and its adapter is still live."""
    releases: int
    """Releases with a new adapter since then."""
    every: int
    """``gate.audit_every``"""
    used: int
    """Verdicts that have used the items of the retention suites, of the one that was asked most often."""

    @classmethod
    def of(cls, settings: Settings, ledger: Ledger, family: Family) -> AuditState:
        name = settings.base.clip if family == "clip" else settings.base.vlm
        base = next((digest for digest, each in names_by_digest(settings.home).items() if each == name), None)
        used = ledger.judgements_of(family, "retention").values()
        return cls(
            tuple(ledger.release_audits(family, base)[:AUDITS]),
            ledger.failed_audit(family),
            len(ledger.unaudited(family, base)),
            settings.gate.audit_every,
            max(used, default=0),
        )

    def to_json(self) -> dict[str, Any]:
        newest = next(iter(self.rows), None)
        return {
            "releases": self.releases, "every": self.every, "used": self.used,
            "newest": None if newest is None else {
                "release": newest.release, "adapter": newest.adapter, "passed": newest.passed,
                "reasons": newest.summary["reasons"], "reference_release": newest.reference_release,
                "created_at": newest.created_at,
            },
            "failed": None if self.failed is None else {
                "release": self.failed.release, "reason": self.failed.summary["reasons"][0],
                "advice": self.failed.advice,
            },
        }  # fmt: skip


@dataclass(frozen=True)
class LearningState:
    fresh: FreshItems
    plan: AnalysisPlan
    alpha: float
    """``gate.alpha``: for the gains of all candidates until the next release, and for the losses of each."""
    audits: AuditState
    lacks: str = ""
    """Missing items to judge an update; none begins until it is empty."""

    @property
    def spent(self) -> float:
        """Alpha spent by the candidates since the last release; each takes its share with its first look."""
        return self.alpha - alpha_left(self.alpha, self.plan.candidates + bool(self.plan.tested))

    @property
    def alpha_line(self) -> str:
        spent = f"{self.spent:.2g} spent, {self.alpha - self.spent:.2g} left"
        return (
            f"alpha {self.alpha:g} for gains until the next release: {spent}; for losses, all of it for each candidate"
        )

    def to_json(self) -> dict[str, Any]:
        candidate = self.fresh.candidate
        return {
            "fresh_items": self.fresh.items,
            "fresh_items_needed": self.fresh.needed,
            "kept": None if candidate is None else {
                "adapter": candidate.update.adapter, "update": candidate.update.id, "looks": len(self.plan.tested),
                "asked_again_with": candidate.next_items,
            },
            "lacks": self.lacks, "alpha": self.alpha, "alpha_spent": self.spent, "candidates": self.plan.candidates,
            "audits": self.audits.to_json(),
        }  # fmt: skip


def learning_states(settings: Settings, ledger: Ledger, store: SampleStore) -> dict[Family, LearningState]:
    return {family: _state(settings, ledger, store, family) for family in families_with_a_base(settings)}


def _state(settings: Settings, ledger: Ledger, store: SampleStore, family: Family) -> LearningState:
    recipe = None
    with suppress(RatchetError):  # the updater reports an unreadable recipe
        recipe = family_recipe(settings, family)
    halved = bool(recipe and recipe.merge.search)
    learned = Learned.of(ledger, store, family)
    fresh = triggers.fresh_items(settings, ledger, store, family, learned, halved=halved)
    looked_at = fresh.candidate.update if fresh.candidate else None
    plan = triggers.plan(settings.gate, ledger, family, looked_at, halved=halved)
    lacks = ""
    try:
        check_suites(settings, family, learned=bool(learned.data_from), read=False)
        if recipe:
            need_reference(settings, recipe)
    except (GateError, ConfigError, RecordError) as error:
        lacks = str(error)
    return LearningState(fresh, plan, settings.gate.alpha, AuditState.of(settings, ledger, family), lacks)


def check_suites(settings: Settings, family: Family, *, learned: bool = False, read: bool = True) -> int:
    """Number of suites for models of a family. ``learned``: whether data was learned before, from which the gate makes
    memory suites. ``read``: read all items, instead of only checking their folders. Raises GateError: a suite cannot be
    read, or there is no retention suite."""
    suites = load_suites(settings.gate.suites, settings.home, family, settings.gate.max_items)
    base = settings.base.clip if family == "clip" else settings.base.vlm
    built_in = not settings.gate.suites and base not in (SHIPPED, SHIPPED_VLM)
    if built_in and not all(suite.folder.is_dir() for suite in suites):
        raise GateError(f"there is no suite for base {base!r}: gate.suites is empty.", MAKE_SUITES)
    for suite in suites:
        if read:
            suite.items()
        else:
            suite.check_folder()
    if not learned and not any(suite.role == "retention" for suite in suites):
        raise GateError(
            f"no retention suite asks a {family.upper()}: no update of it could pass the gate.",
            f"Name one in gate.suites; {MAKE_SUITES}",
        )
    return len(suites)


class LedgerMetrics:
    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._exported: tuple[Any, ...] = ()

    def export(self, families: Iterable[Family]) -> None:
        newest = [(row.id, row.state) for row in self.ledger.updates(1)], [row.id for row in self.ledger.verdicts(1)]
        if newest == self._exported:
            return
        verdicts = self.ledger.verdicts(VERDICTS)
        for family in families:
            costs = [row.cost for row in self.ledger.updates(family=family) if "gflops_spent" in row.cost]
            if costs:
                metrics.update.cost(family, costs[0]["gflops_planned"], costs[0]["gflops_spent"])
            own = [row for row in verdicts if row.adapter.startswith(f"{family}-")]
            if own:
                metrics.gate.scored(family, _scores(own[0]))
                metrics.gate.shifted(family, _shifts(own[0]))
            for row in reversed(own):
                metrics.gate.last(family, row.outcome, row.created_at.timestamp())
        self._exported = newest


def export_budget(settings: Settings, ledger: Ledger) -> None:
    rate, capacity = triggers.bucket(settings)
    level = ledger.bucket_level(time.time(), rate, capacity)
    metrics.update.budget(level, capacity, triggers.planned_gflops(settings))


def _scores(verdict: VerdictRow) -> list[Score]:
    return [
        Score(name, suite["role"], suite["base"], suite["before"], suite["after"], suite.get("margin_left"))
        for name, suite in verdict.summary.get("suites", {}).items()
    ]


def _shifts(verdict: VerdictRow) -> dict[str, tuple[float, float]]:
    shift = (verdict.summary.get("diagnostics") or {}).get("shift")
    towers = shift["towers"] if shift else {}
    return {tower: (moved["from_incumbent"], moved["from_base"]) for tower, moved in towers.items()}
