"""Audits of the live adapter on the sealed quarter of all items, which no candidate was judged on. Every
``gate.audit_every`` releases it is compared with the base and with the adapter of the last audit that passed.

An audit has a level of ``gate.alpha`` of its own. It fails if a suite, or the mean over them, is shown to have lost
more than its margin (Holm over all of them, Bonferroni over the two references): a lineage that keeps what its verdicts
promise fails with at most that probability. With a quarter of the items it cannot exclude what a verdict excludes; it
finds what repeated use of the same items has let in. A failed audit holds updates.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from core.artifacts import Artifacts
from core.ledger import Ledger, ReleaseAuditRow, ReleaseRow
from core.progress import progress_log
from core.recorded_adapters import fetch_recorded
from core.settings import Settings
from streams.store.sample_store import SampleStore
from updater.data.draw import HAVING
from updater.families import family_base
from updater.gate.decision import ItemScores, moved, points
from updater.gate.run import Evaluator, open_evaluator
from updater.gate.sample_suites import CAPACITY, TEXT_COLUMNS, HeldOut, items_by_domain, learned_before, store_suite
from updater.gate.statistics import Comparison, compare_clusters, holm, pool
from updater.gate.suite_items import Seal
from updater.gate.suites import Family, Suite, load_suites
from updater.gate.verdict import MEAN, Change, jsonable
from updater.service.triggers import Learned
from updater.step.learner import Base

SAMPLES = "samples"
"""Name of the suite of sealed held-out samples."""


@dataclass(frozen=True)
class DueAudit:
    live: ReleaseRow
    adapter: str
    last: ReleaseAuditRow | None
    """The last one that passed."""

    @property
    def since(self) -> str:
        return f"since release {self.last.release}" if self.last else "since the first release"


def due_audit(settings: Settings, ledger: Ledger, base: Base, family: Family, *, now: bool = False) -> DueAudit | None:
    """The audit that is due, or None. ``now``: also before ``gate.audit_every`` releases, as an operator asks."""
    live = ledger.stable()
    adapter = live.adapter(family) if live else None
    if live is None or adapter is None:
        return None
    audits = ledger.release_audits(family, base.digest)
    if any(row.release == live.number or (row.adapter == adapter and row.passed) for row in audits):
        return None
    if not now and len(ledger.unaudited(family, base.digest)) < settings.gate.audit_every:
        return None
    return DueAudit(live, adapter, next((row for row in audits if row.passed), None))


def audit_release(
    settings: Settings,
    ledger: Ledger,
    artifacts: Artifacts,
    store: SampleStore,
    base: Base,
    family: Family,
    due: DueAudit,
) -> ReleaseAuditRow:
    """Audit the live adapter, and record the result; idempotent. Raises GateError: a suite cannot be read, or a model
    cannot be scored; AdapterError: an adapter is missing or damaged."""
    learned = Learned.of(ledger, store, family)
    seal = Seal.of(settings, store, ledger.audited_data(family))
    suites = sealed_suites(settings, store, family, learned, seal)
    references = {"the base": None, **({f"release {due.last.release}": due.last.adapter} if due.last else {})}
    progress_log.info(f"audit of release {due.live.number}: {due.adapter} on the sealed items of {len(suites)} suites")
    with open_evaluator(settings, base) as evaluator:
        for name in {due.adapter, *references.values()} - {None}:
            evaluator.load(str(name), fetch_recorded(artifacts, ledger, str(name)))
        compared = {
            words: _compare(settings, evaluator, suites, reference, due.adapter)
            for words, reference in references.items()
        }
    reasons = [
        f"{name}: lost {points(-found.difference)} against {words} ({moved(found)}), {points(found.margin)} allowed, "
        f"{due.since}"
        for words, results in compared.items()
        for name, found in lost(results, settings.gate.alpha / len(compared))
    ]
    summary = {
        "reasons": reasons or [f"no loss beyond a margin is shown {due.since}"],
        "alpha": settings.gate.alpha,
        "references": {
            words: {name: _change(name, found, settings.gate.alpha) for name, found in results.items()}
            for words, results in compared.items()
        },
    }
    row = ledger.record_release_audit(
        ReleaseAuditRow(
            family=family,
            base=base.digest,
            release=due.live.number,
            adapter=due.adapter,
            reference=due.last.adapter if due.last else None,
            reference_release=due.last.release if due.last else None,
            passed=not reasons,
            data_to=learned.data_from,
            summary=jsonable(summary),
        )
    )
    outcome = "passed" if row.passed else "failed, and updates are on hold"
    progress_log.info(f"audit of release {row.release} {outcome}: {row.summary['reasons'][0]}")
    return row


def audit_now(settings: Settings, family: Family) -> ReleaseAuditRow | None:
    """Audit the live release as an operator asks. The earlier audit of an adapter that needs no other one; None if the
    base alone is live. Raises as :func:`audit_release`, and BaseModelError or ConfigError without a base."""
    base, store = family_base(settings, family), SampleStore(settings.lake)
    with closing(Ledger.open(settings.ledger)) as ledger:
        due = due_audit(settings, ledger, base, family, now=True)
        if due is not None:
            return audit_release(settings, ledger, Artifacts(settings.artifacts), store, base, family, due)
        live = ledger.stable()
        adapter = live.adapter(family) if live else None
        return next((row for row in ledger.release_audits(family, base.digest) if row.adapter == adapter), None)


def sealed_suites(
    settings: Settings, store: SampleStore, family: Family, learned: Learned, seal: Seal
) -> list[tuple[Suite, np.ndarray]]:
    """Suites with the rows of their sealed items [n]. A suite is asked whole, so that its questions are as hard as a
    verdict's; of the samples only those that were sealed since the last audit are asked."""
    suites = []
    for suite in load_suites(settings.gate.suites, settings.home, family, settings.gate.max_items):
        sealed = np.array([seal.holds(item.key) for item in suite.items()])
        if suite.role == "retention" and sealed.sum() >= 2:
            suites.append((suite, sealed))
    held_out = HeldOut(store, learned.store_version, HAVING[family], seal, learned.without)
    rows = held_out.rows(TEXT_COLUMNS, part="sealed")
    known = learned_before(rows, held_out.rows(["id"], learned.data_from, part="sealed"))
    items = [item for own in items_by_domain(known, family, held_out).values() for item in own]
    if len(items) >= 2:
        about = "Sealed samples of what was learned since the last audit."
        sample_suite = store_suite(items, SAMPLES, "retention", family, CAPACITY[family], about, held_out)
        suites.append((sample_suite, np.ones(len(sample_suite.items()), dtype=bool)))
    return suites


def lost(results: Mapping[str, Comparison], level: float) -> list[tuple[str, Comparison]]:
    """What is shown to have lost more than its margin. ``level``: of the tests against one reference together."""
    shown = holm([_p_beyond(found) for found in results.values()], level)
    return [entry for entry, (is_beyond, _) in zip(results.items(), shown, strict=True) if is_beyond]


def _p_beyond(found: Comparison) -> float:
    """p of H0: the loss is at most the margin."""
    return found.resample().p_below(-found.margin)


def _compare(
    settings: Settings,
    evaluator: Evaluator[Any],
    suites: Sequence[tuple[Suite, np.ndarray]],
    reference: str | None,
    adapter: str,
) -> dict[str, Comparison]:
    """By suite, and for their mean. Against the base samples have no part in the mean: see the gate's mean loss."""
    results: dict[str, Comparison] = {}
    for suite, rows in suites:
        before, after = (evaluator.score(suite, name, label=f"{suite.name}, audit") for name in (reference, adapter))
        results[suite.name] = compare_rows(suite, before, after, rows, settings.gate.margin, settings.gate.alpha)
    counted = [results[suite.name] for suite, _ in suites if reference is not None or suite.data]
    if counted:
        results[MEAN] = pool(counted, settings.gate.mean_margin)
    return results


def compare_rows(
    suite: Suite, before: ItemScores, after: ItemScores, rows: np.ndarray, margin: float, level: float
) -> Comparison:
    clusters = suite.clusters()
    return compare_clusters(
        before.hits[rows],
        after.hits[rows],
        None if clusters is None else clusters[rows],
        margin=suite.margin or margin,
        level=level,
        seed=zlib.crc32(suite.name.encode()),
    )


def _change(name: str, found: Comparison, level: float) -> dict[str, Any]:
    change = Change(name, found.before, found.after, found.difference, *found.bounds(level), _p_beyond(found))
    return {**asdict(change), "margin": found.margin, "n": found.n, "units": found.units}
