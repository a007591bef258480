"""One candidate's outcomes on all items, the truth according to them, and the gate's verdict on any draw of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from core.ledger.rows import GateOutcome
from core.settings.updates import Gate
from updater.gate.decision import Scores, conclude, decide
from updater.gate.interim_analyses import candidate_alpha
from updater.gate.suite_items import SEALED
from updater.gate.suites import Suite
from updater.gate.verdict import MEAN, MeanLoss, SuiteResult

Hits = NDArray[np.float64]
Answers = NDArray[np.float64] | NDArray[np.int32]
"""[items, views]: 0-based ranks of the right answers (integers), or 0 and 1 if only hits were kept (floats)."""
Outcomes = Mapping[str, Answers]
Truth = Literal["harmful", "idle", "good"]

FEW = 30
"""Cases whose verdicts take no longer than processes take to start."""


def hits_of(suite: Suite, answers: Answers) -> Hits:
    """0 or 1 for each answer."""
    hits = answers < suite.k if has_ranks(answers) else answers
    return hits.astype(np.float64)


def judged_of(items: int) -> int:
    """Number of a suite's items that candidates are judged on; the others are sealed."""
    return items - items // SEALED


def has_ranks(answers: Answers) -> bool:
    return bool(np.issubdtype(answers.dtype, np.integer))


@dataclass(frozen=True, slots=True)
class Rule:
    """The rules of the gate's first look."""

    level: float
    """Of the test for a gain."""
    loss_level: float
    margin: float
    mean_margin: float
    min_items: int

    @classmethod
    def of(cls, settings: Gate) -> Rule:
        level = candidate_alpha(settings.alpha, 0)
        return cls(level, settings.alpha, settings.margin, settings.mean_margin, settings.min_items)


@dataclass(frozen=True, slots=True)
class Case:
    """Aligned outcomes of base, incumbent (``before``) and candidate (``after``).

    ``before is base`` if nothing was released. ``suites`` are all retention suites and the gain suites.
    """

    name: str
    kind: str
    suites: tuple[Suite, ...]
    judged: Mapping[str, int]
    """Items that the gate judges, by suite: the weights of the mean loss."""
    base: Outcomes
    before: Outcomes
    after: Outcomes

    def rows(self, picked: Mapping[str, NDArray[np.int_]]) -> Case:

        def some(outcomes: Outcomes) -> Outcomes:
            return {suite.name: outcomes[suite.name][picked[suite.name]] for suite in self.suites}

        base = some(self.base)
        return replace(
            self, base=base, before=base if self.before is self.base else some(self.before), after=some(self.after)
        )

    def own(self) -> Case:
        """The suites' own draw, as the gate gets it: the first items of each suite."""
        return self.rows({suite.name: np.arange(self.judged[suite.name]) for suite in self.suites})

    def without_base(self) -> Case:
        return replace(self, base=self.before)

    def lost(self, suite: Suite) -> float:
        """Share lost on all items, against the better of incumbent and base."""
        base, before, after = (hits_of(suite, side[suite.name]).mean() for side in (self.base, self.before, self.after))
        return float(max(before, base) - after)

    def beyond(self, rule: Rule) -> float:
        """Most that a retention suite lost beyond its margin; negative if all are inside."""
        return max(self.lost(s) - (s.margin or rule.margin) for s in self.suites if s.role == "retention")

    def excess(self, rule: Rule) -> float:
        """Most that a suite, or the mean, lost beyond its margin."""
        return max(self.beyond(rule), self.mean_lost - rule.mean_margin)

    @property
    def mean_lost(self) -> float:
        """Share lost on average over the retention suites, weighted as the gate does it, against incumbent or base."""
        retention = [suite for suite in self.suites if suite.role == "retention"]
        weights = [self.judged[suite.name] for suite in retention]

        def mean(side: Outcomes) -> float:
            return float(np.average([hits_of(suite, side[suite.name]).mean() for suite in retention], weights=weights))

        return max(mean(self.before), mean(self.base)) - mean(self.after)

    @property
    def gained(self) -> float:
        """The largest gain on all items of a gain suite, against the incumbent."""
        gains = [suite for suite in self.suites if suite.role == "gain"]
        return max(float((hits_of(s, self.after[s.name]) - hits_of(s, self.before[s.name])).mean()) for s in gains)

    def truth(self, rule: Rule) -> Truth:
        """Harmful if a retention suite lost more than its margin, or all together more than that of the mean; else good
        if it gained anything, and idle if not."""
        if self.excess(rule) > 0:
            return "harmful"
        return "good" if self.gained > 0 else "idle"


@dataclass(frozen=True, slots=True)
class Judged:
    outcome: GateOutcome
    results: tuple[SuiteResult, ...]
    gained: bool
    """True if a gain was shown, over all gain suites."""
    mean: MeanLoss | None

    @property
    def unproven(self) -> list[str]:
        """Retention suites, and the mean of them, for which a loss of the margin is not excluded."""
        held = [r.name for r in self.results if r.role == "retention" and r.decision != "passed"]
        return held + ([MEAN] if self.mean is None or self.mean.decision != "passed" else [])

    @property
    def retained(self) -> bool:
        return not self.unproven


@dataclass(frozen=True, slots=True)
class ItemMarks:
    """One model's answers to one suite in the form of the gate's decision. Items are named by their number."""

    ids: NDArray[np.str_]
    hits: Hits
    ranks: NDArray[np.int32] | None


def item_scores_of(suite: Suite, answers: Answers) -> ItemMarks:
    ids = np.arange(len(answers)).astype(str)
    return ItemMarks(ids, hits_of(suite, answers), answers.astype(np.int32) if has_ranks(answers) else None)


def judge(case: Case, rule: Rule) -> Judged:
    """The gate's own decision on all items of a case, without the engineering checks, which only reject more."""
    scores = []
    for suite in case.suites:
        base = item_scores_of(suite, case.base[suite.name])
        before = base if case.before is case.base else item_scores_of(suite, case.before[suite.name])
        scores.append(Scores(suite, base, before, item_scores_of(suite, case.after[suite.name])))
    findings = decide(
        scores,
        level=rule.level,
        loss_level=rule.loss_level,
        margin=rule.margin,
        mean_margin=rule.mean_margin,
        min_items=rule.min_items,
    )
    gained = findings.gain is not None and findings.gain.decision == "passed"
    return Judged(conclude(findings, ())[0], findings.results, gained, findings.mean)
