"""Gates a trained candidate: its suites, the gate, its report, and the ledger's row."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from core import metrics
from core.artifacts import Artifacts
from core.errors import AdapterError
from core.ledger import Ledger, UpdateRow, VerdictRow
from core.recorded_adapters import fetch_recorded
from core.settings import Settings
from serving.engines.adapters import adapter_name
from serving.engines.calibration import Calibration
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase, need_base
from serving.engines.heads import read_heads
from streams.store.sample_store import SampleStore
from updater.data.draw import HAVING, left_out
from updater.gate.calibration import kept_lengths, store_calibration, store_missing
from updater.gate.clip import AcrossBasesEvaluator, ClipEvaluator, base_alone
from updater.gate.cross_version import store_bridge
from updater.gate.decision import percent
from updater.gate.diagnostics import StoreCounts
from updater.gate.report import write_report
from updater.gate.run import Evaluator, open_evaluator, run_gate
from updater.gate.sample_suites import (
    TEXT_COLUMNS,
    HeldOut,
    best_releases,
    choose_memory,
    correction_suites,
    fresh_suites,
    head_suites,
    learned_before,
    memory_suites,
)
from updater.gate.suite_items import Seal
from updater.gate.suites import Suite, load_suites
from updater.gate.verdict import Blame, Verdict
from updater.recipes import Family, Recipe
from updater.service import triggers
from updater.service.blame import blame
from updater.service.update_pools import pools_of
from updater.step.learner import Base


def gate_update(
    settings: Settings, ledger: Ledger, artifacts: Artifacts, store: SampleStore, base: Base, update: UpdateRow
) -> UpdateRow:
    """Gate the adapter of a trained update and record the verdict, once. Idempotent. ``base``: of the adapter; an
    upgrade's incumbent has another one. Raises GateError: a suite cannot be read, base or incumbent cannot be scored,
    or the engine died. The update stays ``trained``."""
    row = ledger.verdict_of(update.id)
    if row is None:
        verdict = _gate(settings, ledger, artifacts, store, base, update)
        key = f"reports/{update.id}"
        with tempfile.TemporaryDirectory() as folder:
            write_report(verdict, Path(folder))
            for file in sorted(Path(folder).iterdir()):
                # File by file: a repeated gate has another duration, and replaces the report of a lost verdict.
                artifacts.write_bytes(f"{key}/{file.name}", file.read_bytes())
        row = ledger.record_verdict(update.id, verdict.candidate, verdict.outcome, key, verdict.summary())
        again = verdict.outcome == "inconclusive" and verdict.look.next is not None
        outcome = "kept" if again else verdict.outcome
        metrics.gate.decided(update.family, outcome, verdict.seconds, _gflops(row, update))
    cost = {"gate_seconds": row.summary.get("seconds"), "gate_gflops": _gflops(row, update)}
    return ledger.advance_update(update.id, "gated", cost=cost)


def _gflops(verdict: VerdictRow, update: UpdateRow) -> float:
    """GFLOPs of the candidate's forward passes over all suites; base and incumbent are scored once and cached."""
    items = int(sum(suite["n"] for suite in verdict.summary.get("suites", {}).values()))
    return items * float(update.cost.get("sample_gflops", 0.0))


def _gate(
    settings: Settings, ledger: Ledger, artifacts: Artifacts, store: SampleStore, base: Base, update: UpdateRow
) -> Verdict:
    adapter = str(update.adapter)
    meta: dict[str, Any] = {
        "update": update.id,
        "recipe": update.recipe.get("name"),
        "seed": update.seed,
        "store_version": update.store_version,
        "data_from": update.data_from,
        "data_to": update.data_to,
        "rank": update.recipe.get("rank"),
    }
    upgrade = ledger.base_upgrade(update.id)
    seal = Seal.of(settings, store, ledger.audited_data(update.family))
    suites, fresh = update_suites(settings, store, update, seal, update.data_to if upgrade else None)
    try:
        directory = fetch_recorded(artifacts, ledger, adapter)
        everything = HeldOut(store, update.store_version, None, seal, left_out(update))
        suites += head_suites(settings, everything, read_heads(directory))
    except AdapterError as error:  # a verdict, with this as its reason
        directory, meta["load_error"] = None, error.message
    retention = [suite for suite in suites if suite.role == "retention"]
    fixed, learned = ([suite.name for suite in retention if bool(suite.data) == over] for over in (True, False))
    released_base = base.digest if upgrade is None else upgrade.old_base
    best = best_releases(ledger.released_verdicts(base.family, released_base), fixed, learned, update.incumbent)
    halved = bool(update.recipe.get("merge", {}).get("search"))
    plan = triggers.plan(settings.gate, ledger, base.family, update, halved=halved)
    incumbent = update.incumbent
    opened: AbstractContextManager[Evaluator[Any]] = open_evaluator(settings, base)
    if upgrade is not None:
        old = need_base(settings.home, upgrade.old_base, upgrade.old_name)
        new = need_base(settings.home, upgrade.new_base, upgrade.new_name)
        engines = [ClipEngine.of(settings, each, threads=settings.updater.threads) for each in (old, new)]
        opened = nullcontext(AcrossBasesEvaluator(engines[0], engines[1], adapter))
        incumbent = incumbent or base_alone(old)
        meta["upgrade"] = {"from": upgrade.old_name, "from_digest": upgrade.old_base, "to": upgrade.new_name}
    if halved:
        meta["tuned_on"] = [
            suite.name for suite in tuned_on([*suites, *fresh], settings.gate.min_items) if not suite.head
        ]
    released = fetch_recorded(artifacts, ledger, update.incumbent) if update.incumbent else None
    with opened as evaluator:
        if update.incumbent and released:
            evaluator.load(update.incumbent, released)
        for name in sorted({*best.values()} - {adapter}):
            try:
                evaluator.load(name, fetch_recorded(artifacts, ledger, name))
            except AdapterError as error:  # a missing old release must not block every new one
                best = {suite: other for suite, other in best.items() if other != name}
                meta.setdefault("not_compared", {})[name] = error.message
        if directory is not None:
            try:
                meta["bytes"] = sum(file.stat().st_size for file in directory.iterdir())
                evaluator.load(adapter, directory, candidate=True)
            except AdapterError as error:
                meta["load_error"] = error.message
        corrected = correction_suites_of(settings, store, update, seal)
        if corrected and directory is not None and "load_error" not in meta:
            meta["corrections"] = [_told(evaluator, suite, update.incumbent, adapter) for suite in corrected]
        verdict = run_gate(
            evaluator=evaluator,
            candidate=adapter,
            incumbent=incumbent,
            suites=suites,
            fresh=fresh,
            best=best,
            used=ledger.judgements_of(base.family),
            counts=StoreCounts(store, update.store_version, HAVING[update.family], settings.home / "cache" / "gate"),
            plan=plan,
            settings=settings.gate,
            cost=update.cost,
            meta=meta,
        )
        if isinstance(evaluator, ClipEvaluator):
            store_bridge(artifacts, evaluator, verdict)
            if verdict.diagnostics.calibration:
                lengths = kept_lengths(evaluator, [*suites, *fresh], adapter, settings.gate)
                store_calibration(artifacts, evaluator, adapter, Calibration(verdict.diagnostics.calibration, lengths))
                if upgrade is None:
                    store_missing(artifacts, evaluator, [*suites, *fresh], update.incumbent, settings.gate)
        if (
            verdict.outcome == "rejected"
            and isinstance(base, ClipBase)
            and isinstance(evaluator, ClipEvaluator)
            and directory is not None
            and upgrade is None
        ):
            found = _blame(settings, store, base, update, evaluator, verdict, suites, released)
            return replace(verdict, blame=found)
        return verdict


def _blame(
    settings: Settings,
    store: SampleStore,
    base: ClipBase,
    update: UpdateRow,
    evaluator: ClipEvaluator,
    verdict: Verdict,
    suites: Sequence[Suite],
    incumbent: Path | None,
) -> Blame | None:
    """Find the source of a regression; None for an import, and where no suite got worse."""
    lost = {result.name: result.difference for result in verdict.suites if result.decision == "failed"}
    if verdict.mean is not None and verdict.mean.decision == "failed":
        lost |= {result.name: result.difference for result in verdict.suites if result.role == "retention"}
    if not lost or "visited" not in update.cost:
        return None
    worst = sorted((each for each in suites if each.name in lost), key=lambda each: lost[each.name])
    recipe = Recipe.parse(update.recipe, f"recipe of {update.id}")
    pools = pools_of(settings, store, update, recipe)
    return blame(base, recipe, incumbent, update, store, pools, evaluator, worst)


def update_suites(
    settings: Settings,
    store: SampleStore,
    update: UpdateRow,
    seal: Seal,
    learned: Mapping[str, int] | None = None,
) -> tuple[list[Suite], list[Suite]]:
    """Return the suites that judge an update, without what is sealed: configured and memory suites, and fresh ones.
    ``learned``: end of the data that the incumbent has learned; by default the start of the update's own. For an
    upgrade, which learns them again, their held-out samples are in both kinds of suite. Raises GateError if a suite
    cannot be read."""
    learned = update.data_from if learned is None else learned
    family = update.family
    held_out = HeldOut(store, update.store_version, HAVING[family], seal, left_out(update))
    fresh = held_out.rows(TEXT_COLUMNS, update.data_from)
    min_items, most = settings.gate.min_items, settings.gate.max_items
    suites = [each.part("judged", seal) for each in load_suites(settings.gate.suites, settings.home, family, most)]
    if learned:  # else nothing was learned yet
        pending = fresh if learned == update.data_from else held_out.rows(["id"], learned)
        suites += learned_suites(held_out, family, pending, 2 * min_items)
    return suites, fresh_suites(fresh, held_out, family=family, min_items=min_items, limit=most)


def correction_suites_of(settings: Settings, store: SampleStore, update: UpdateRow, seal: Seal) -> list[Suite]:
    held_out = HeldOut(store, update.store_version, HAVING[update.family], seal, left_out(update))
    rows, bounds = held_out.rows(TEXT_COLUMNS), settings.gate
    return correction_suites(rows, held_out, family=update.family, min_items=bounds.min_items, limit=bounds.max_items)


def _told(evaluator: Evaluator[Any], suite: Suite, incumbent: str | None, candidate: str) -> str:
    """A diagnostic for the report; a candidate that fails at it fails at the gate's own suites, too."""
    try:
        before, after = (evaluator.score(suite, name).hits.mean() for name in (incumbent, candidate))
    except (RuntimeError, ValueError, AdapterError) as error:
        return f"{suite.name}: not answered: {error}"
    return (
        f"{suite.name}: {suite.metric} of {len(suite.items())} corrections from {percent(before)} to {percent(after)}; "
        "they were chosen by an incumbent's errors, so part of a gain is regression to the mean, and it decides nothing"
    )


def learned_suites(held_out: HeldOut, family: Family, pending: pa.Table, min_units: int) -> list[Suite]:
    """Memory suites of all samples except the ``pending`` ones, a table with their ids. ``min_units``: of a suite."""
    chosen = choose_memory(learned_before(held_out.rows(["id", "domain"]), pending), family, min_units)
    rows = held_out.some([each for ids in chosen.values() for each in ids], TEXT_COLUMNS)
    return memory_suites(rows, chosen, family, min_units, held_out)


def tuned_on(suites: Sequence[Suite], min_items: int) -> list[Suite]:
    return [suite for suite in suites if suite.divisible(min_items)]


class TuningScores:
    """Scores merged adapters of one update on the tuning half of its suites, through the serving engine: a
    :class:`updater.methods.merging.Scored`. The verdict then uses the hidden half. PAINT's measure: the mean of
    retention suites and gain suites."""

    def __init__(self, settings: Settings, base: Base, suites: Sequence[Suite]) -> None:
        """``suites``: result of :func:`tuned_on`; if empty, there is no search, and the recipe's weight is used."""
        self.settings = settings
        self.base = base
        self.suites = [suite.half("tuning") for suite in suites]

    @classmethod
    def of(
        cls,
        settings: Settings,
        store: SampleStore,
        base: Base,
        update: UpdateRow,
        seal: Seal,
        learned: Mapping[str, int] | None = None,
    ) -> TuningScores:
        """Scores for the suites of :func:`update_suites`. Raises GateError."""
        suites, fresh = update_suites(settings, store, update, seal, learned)
        return cls(settings, base, tuned_on([*suites, *fresh], settings.gate.min_items))

    @property
    def passes(self) -> int:
        return sum(len(suite.items()) for suite in self.suites)

    def __call__(self, directory: Path) -> float:
        """Mean of both roles' means, or of one role without suites of the other; between 0 and 1."""
        name = adapter_name(directory)
        by_role: dict[str, list[float]] = {}
        with open_evaluator(self.settings, self.base) as evaluator:
            evaluator.load(name, directory)
            for suite in self.suites:
                score = evaluator.score(suite, name, label=f"{suite.name}, tuning half").hits.mean()
                by_role.setdefault(suite.role, []).append(float(score))
        means = [sum(scores) / len(scores) for scores in by_role.values()]
        return sum(means) / len(means) if means else 0.0
