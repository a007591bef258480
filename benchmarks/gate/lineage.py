"""Lineages of updates in a row, judged on items that are used again and again.

Every proposal is judged by the gate's own decision, against the references of the service: the incumbent, the base and
the best release. It is released if retention passes; the gain is taken as shown, which is the
worst case for what retention has to hold back. Audits of the live model on the sealed items decide as in service; after
a failed one the lineage goes back to the last audited model. At every step three probes are judged and never released:

harmless   on every suite as good as the best of its references
mean loss  worse than the reference with the highest mean by the mean margin, on every suite
edge       on one suite worse than the best of its references by the margin, or up to a point more
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.gate.cases import Rule
from benchmarks.gate.lineage_world import SUITES, Floats, Kind, Model, World
from core.ledger import VerdictRow
from core.settings.updates import Gate
from updater.gate.decision import Findings, Scores, decide
from updater.gate.sample_suites import best_releases
from updater.gate.statistics import Comparison, pool
from updater.gate.verdict import MEAN
from updater.service.release_audit import compare_rows, lost

COMMON, OWN = 0.003, 0.005
"""Standard deviations of an update's movement of the truth: the part that all suites share, and that of each suite."""
EDGE = 0.01


@dataclass(slots=True)
class Course:
    """The events of a lineage."""

    items: int
    kind: Kind
    counts: Counter[str] = field(default_factory=Counter)
    """Events, by name: of `mean_loss` probes `mean_loss_passed` passed, and so on."""
    standing: float = -1.0
    """Largest true loss of a suite, against the base, that a passed audit left in place."""
    truth: float = 0.0
    """Mean truth over the suites at the end."""

    def false_accept(self, harm: float) -> bool:
        return self.standing >= harm


@dataclass(frozen=True, slots=True)
class References:
    """The models that a candidate is compared with, in addition to the base."""

    incumbent: Model
    best: Model | None


class Lineage:
    """One lineage. ``rng``: of the world and of the updates."""

    def __init__(self, items: int, kind: Kind, settings: Gate, rng: np.random.Generator) -> None:
        self.world, self.settings, self.rng = World(items, kind, rng), settings, rng
        self.rule = Rule.of(settings)
        self.names = [suite.name for suite in self.world.suites]
        self.base = self.live = self.audited = self.world.base
        self.released: list[tuple[Model, VerdictRow]] = []
        """All releases, newest first. One that was taken back stays a reference, as it does in service."""
        self.unaudited = 0
        self.course = Course(items, kind)

    def run(self, updates: int) -> Course:
        for number in range(updates):
            self._probe(number)
            self._propose(number)
            if self.unaudited >= self.settings.audit_every:
                self._audit()
        self.course.truth = float(self.live.truth.mean())
        return self.course

    def references(self) -> References:
        verdicts, models = [row for _, row in self.released], {model.name: model for model, _ in self.released}
        incumbent = None if self.live is self.base else self.live.name
        best = best_releases(verdicts, self.names, (), incumbent)
        return References(self.live, models[best[self.names[0]]] if best else None)

    def judge(
        self, candidate: Model, references: References, asked: Sequence[int] = range(SUITES), mean_margin: float = 0.0
    ) -> Findings:
        """The gate's findings about the retention suites ``asked``. ``mean_margin``: that of the settings if 0."""
        scores = []
        for i in asked:
            suite, best = self.world.suites[i], references.best
            base, before, after = (model.judged[i] for model in (self.base, references.incumbent, candidate))
            scores.append(Scores(
                suite, base, before, after,
                best=best.judged[i] if best else None, best_name=best.name if best else "",
            ))  # fmt: skip
        return decide(
            scores,
            level=self.rule.level,
            loss_level=self.rule.loss_level,
            margin=self.rule.margin,
            mean_margin=mean_margin or self.rule.mean_margin,
            min_items=self.rule.min_items,
        )

    def _probe(self, number: int) -> None:
        references, counts = self.references(), self.course.counts
        compared = [m for m in (self.base, references.incumbent, references.best) if m is not None]
        top = np.max([model.truth for model in compared], axis=0)
        suites, mean = kept(self.judge(self._update(top), references))
        counts.update(harmless=1, harmless_suites=suites, harmless_mean=mean, harmless_passed=suites and mean)
        best = max(compared, key=lambda model: model.truth.mean())
        suites, mean = kept(self.judge(self._update(best.truth - self.rule.mean_margin), references))
        counts.update(mean_loss=1, mean_loss_suites=suites, mean_loss_mean=mean, mean_loss_passed=suites and mean)
        i = number % SUITES
        lower = top.copy()
        margin = self.world.suites[i].margin or self.rule.margin
        lower[i] -= margin + self.rng.uniform(0, EDGE)
        # A suite passes or not whatever the others say. One suite alone with its own margin as that of the mean takes
        # no bootstrap: a pool of one stratum is the stratum.
        (found,) = self.judge(self._update(lower), references, [i], margin).results
        counts.update(edge=1, edge_passed=found.decision == "passed")

    def _propose(self, number: int) -> None:
        moved = self.rng.normal(self.world.kind.drift, COMMON) + self.rng.normal(0, OWN, SUITES)
        candidate = self.world.updated(self.live, self.live.truth + moved, f"update{number}")
        findings = self.judge(candidate, self.references())
        self.course.counts["proposed"] += 1
        if not all(kept(findings)):
            return
        self.course.counts.update(releases=1, harmful=worst_loss(candidate, self.base) >= self.rule.margin)
        summary = {"suites": {result.name: result.summary() for result in findings.results}}
        row = VerdictRow(update_id="", adapter=candidate.name, outcome="passed", report_key="", summary=summary)
        self.released.insert(0, (candidate, row))
        self.live = candidate
        self.unaudited += 1

    def _audit(self) -> None:
        references = list(dict.fromkeys((self.base, self.audited)))
        compared = [self._compare(reference) for reference in references]
        failed = any(lost(results, self.settings.alpha / len(references)) for results in compared)
        harmful = any(
            worst_loss(self.live, reference) >= self.rule.margin
            or (reference.truth - self.live.truth).mean() >= self.rule.mean_margin
            for reference in references
        )
        self.course.counts.update(audits=1, audits_failed=failed, harmless_audits=not harmful)
        self.course.counts["audits_failed_falsely"] += failed and not harmful
        self.unaudited = 0
        if failed:
            self.live = self.audited
        else:
            self.course.standing = max(self.course.standing, worst_loss(self.live, self.base))
            self.audited = self.live

    def _compare(self, reference: Model) -> dict[str, Comparison]:
        results = {
            suite.name: compare_rows(
                suite, reference.all[i], self.live.all[i], self.world.sealed, self.rule.margin, self.settings.alpha
            )
            for i, suite in enumerate(self.world.suites)
        }
        return {**results, MEAN: pool(list(results.values()), self.rule.mean_margin)}

    def _update(self, truth: Floats) -> Model:
        return self.world.updated(self.live, truth, "probe")


def kept(findings: Findings) -> tuple[bool, bool]:
    """True if all retention suites pass, and true if the mean does."""
    suites = all(result.decision == "passed" for result in findings.results)
    return suites, findings.mean is not None and findings.mean.decision == "passed"


def worst_loss(model: Model, reference: Model) -> float:
    """The largest true loss of a suite."""
    return float((reference.truth - model.truth).max())
