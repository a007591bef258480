"""From a trained candidate to a stored verdict: the gate, its report, and the ledger's row."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from core import metrics
from core.artifacts import Artifacts
from core.errors import AdapterError
from core.ledger import Ledger, UpdateRow
from core.settings import Settings
from serving.engines.clip_base import ClipBase
from serving.engines.heads import read_heads
from serving.engines.vlm.vlm_base import VlmBase
from streams.store import Having, SampleStore
from updater.adapters.recorded import fetch_recorded
from updater.data.draw import HAVING
from updater.gate import Verdict, run_gate, write_report
from updater.gate.across_bases import base_alone
from updater.gate.best_releases import best_releases
from updater.gate.diagnostics.concept_counts import StoreCounts
from updater.gate.evaluator_factory import open_across_bases, open_evaluator
from updater.gate.head_suites import head_suites
from updater.loop.tuning import tuned_on, update_suites
from updater.scheduling import kept_candidates
from updater.upgrades.replay import new_base, old_base


def gate_update(
    settings: Settings,
    ledger: Ledger,
    artifacts: Artifacts,
    store: SampleStore,
    base: ClipBase | VlmBase,
    update: UpdateRow,
) -> UpdateRow:
    """Gate the adapter of a trained update and record what came out. Safe to repeat: a verdict is recorded once.

    Args:
        base: that the adapter is of; an upgrade's incumbent is of another one.

    Raises:
        GateError: a suite cannot be read, base or incumbent cannot be scored, or the engine died. The update stays
            ``trained``.
    """
    adapter = str(update.adapter)
    if ledger.verdict_of(update.id) is None:
        verdict = _gate(settings, ledger, artifacts, store, base, update, adapter)
        key = f"reports/{update.id}"
        with tempfile.TemporaryDirectory() as folder:
            write_report(verdict, Path(folder))
            for file in sorted(Path(folder).iterdir()):
                # Written file by file: a repeated gate has another duration, and replaces the report of a lost verdict.
                artifacts.write_bytes(f"{key}/{file.name}", file.read_bytes())
        ledger.record_verdict(update.id, adapter, verdict.outcome, key, verdict.summary())
        _count(verdict, update)
    return ledger.advance_update(update.id, "gated", cost=_gate_cost(ledger, update))


def _gate(
    settings: Settings,
    ledger: Ledger,
    artifacts: Artifacts,
    store: SampleStore,
    base: ClipBase | VlmBase,
    update: UpdateRow,
    adapter: str,
) -> Verdict:
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
    suites, fresh = update_suites(settings, store, update, update.data_to if upgrade else None)
    try:
        directory = fetch_recorded(artifacts, ledger, adapter)
        suites += head_suites(settings, store, update.store_version, read_heads(directory))
    except AdapterError as error:  # a verdict, with this as its reason
        directory, meta["load_error"] = None, error.message
    names = [suite.name for suite in suites if suite.role == "retention"]
    released = base.digest if upgrade is None else upgrade.old_base
    best = best_releases(ledger, base.family, released, names, update.incumbent)
    halved = bool(update.recipe.get("merge", {}).get("search"))
    plan = kept_candidates.plan(settings.gate, ledger, base.family, update, halved=halved)
    incumbent = update.incumbent
    if upgrade is None:
        opened = open_evaluator(settings, base)
    else:
        old, new = old_base(settings, upgrade), new_base(settings, upgrade)
        opened = open_across_bases(settings, old, new, adapter)
        incumbent = incumbent or base_alone(old)
        meta["upgrade"] = {"from": upgrade.old_name, "from_digest": upgrade.old_base, "to": upgrade.new_name}
    if halved:
        meta["tuned_on"] = [
            suite.name for suite in tuned_on([*suites, *fresh], settings.gate.min_items) if not suite.head
        ]
    with opened as evaluator:
        if update.incumbent:
            evaluator.load(update.incumbent, fetch_recorded(artifacts, ledger, update.incumbent))
        for name in sorted({*best.values()} - {adapter}):
            try:
                evaluator.load(name, fetch_recorded(artifacts, ledger, name))
            except AdapterError as error:  # an old release that is gone must not keep every new one out
                best = {suite: other for suite, other in best.items() if other != name}
                meta.setdefault("not_compared", {})[name] = error.message
        if directory is not None:
            try:
                meta["bytes"] = sum(file.stat().st_size for file in directory.iterdir())
                evaluator.load(adapter, directory, candidate=True)
            except AdapterError as error:
                meta["load_error"] = error.message
        return run_gate(
            evaluator=evaluator,
            candidate=adapter,
            incumbent=incumbent,
            suites=suites,
            fresh=fresh,
            best=best,
            counts=StoreCounts(store, update.store_version, _having(update), settings.home / "cache" / "gate"),
            plan=plan,
            settings=settings.gate,
            cost=update.cost,
            meta=meta,
        )


def _having(update: UpdateRow) -> Having:
    return HAVING["vlm" if update.family == "vlm" else "clip"]


def _count(verdict: Verdict, update: UpdateRow) -> None:
    again = verdict.outcome == "inconclusive" and verdict.look.next is not None
    outcome = "kept" if again else verdict.outcome
    metrics.gate.decided(update.family, outcome, verdict.seconds, _gflops(verdict.summary(), update))


def _gate_cost(ledger: Ledger, update: UpdateRow) -> dict[str, Any]:
    verdict = ledger.verdict_of(update.id)
    assert verdict is not None
    return {"gate_seconds": verdict.summary.get("seconds"), "gate_gflops": _gflops(verdict.summary, update)}


def _gflops(summary: dict[str, Any], update: UpdateRow) -> float:
    """Forward passes of the candidate over all suites, in GFLOPs; base and incumbent are scored once and kept."""
    items = int(sum(suite["n"] for suite in summary.get("suites", {}).values()))
    return items * float(update.cost.get("sample_gflops", 0.0))
