"""A verdict as plain data: what the gate found, in a form that the ledger, the console and the report can read."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from core.ledger.rows import GateOutcome
from updater.gate.diagnostics.results import Diagnostics, without_pictures
from updater.gate.interim_analyses import Look, alpha_left

Decision = Literal["passed", "failed", "inconclusive"]


@dataclass(frozen=True, slots=True)
class Check:
    """One engineering check. `value` and `limit` are in the unit that `detail` names."""

    name: str
    ok: bool
    detail: str
    value: float | None = None
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Regression:
    """An item that was right before and is wrong now.

    Of a sample of the store only ids are kept, and its texts and its thumbnail are empty: who shows the report reads
    them from the store (:mod:`updater.gate.report`), so that a sample that is deleted is in no report.
    """

    id: str
    text: str
    """Caption, class or question."""
    view: str
    """How it was asked: "class", "image to text", "text to image" or "answer"."""
    rank_before: int
    """0-based rank of the right answer; 0 is right. Of a free answer 0 if it is right, 1 if it is not."""
    rank_after: int
    answer_before: str
    answer_after: str
    thumbnail: str
    """JPEG data URI, at most 96 px; empty if the image could not be read."""
    expected: str = ""
    """Reference answers of a question."""
    sample: str = ""
    """Id in the sample store; empty for an item of a folder."""
    sample_before: str = ""
    """The sample whose caption or image was the answer, in retrieval over samples."""
    sample_after: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """One quantity before and after, over one suite or several."""

    name: str
    """What is measured: a metric, or the rank statistic."""
    before: float
    after: float
    difference: float
    ci_low: float
    """One-sided bounds at the level of the test."""
    ci_high: float
    p: float
    """Of a `statistic` that there is no gain; of the others that the loss is at least the margin."""


@dataclass(frozen=True, slots=True)
class PooledGain:
    """What all gain suites say together; it decides whether there is a gain."""

    decision: Decision
    reason: str
    n: int
    units: int
    """Independent captions, images or items."""
    strata: dict[str, int]
    """Units of each suite: its weight in the mean."""
    statistic: Change
    """What must become better."""
    recall: Change
    """The metric that users see; a loss of `margin` must be excluded."""
    margin: float
    alpha: float
    """The level of both tests: that of the look."""
    method: str
    spread: float
    """Standard deviation of one unit's difference of the statistic."""
    recall_spread: float
    """The same of `recall`."""

    def summary(self) -> dict[str, Any]:
        """What the ledger keeps."""
        return {
            "decision": self.decision, "units": self.units, "strata": self.strata, "margin": self.margin,
            "spread": self.spread, "recall_spread": self.recall_spread,
            "statistic": asdict(self.statistic), "recall": asdict(self.recall),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """What one suite found. Scores and differences are shares (0.05 = 5 points)."""

    name: str
    role: str
    task: str
    metric: str
    description: str
    half: str
    n: int
    units: int
    """Independent captions, images or items; `min_items` counts these."""
    base: float
    before: float
    after: float
    difference: float
    """after - before."""
    ci_low: float
    """One-sided bounds at `alpha`, so [ci_low, ci_high] is a two-sided 1 - 2 alpha interval."""
    ci_high: float
    difference_base: float
    """after - base."""
    ci_base_low: float
    ci_base_high: float
    p: float
    """Retention: of a loss of at least the margin, the largest over the references. Gain: of no gain."""
    p_incumbent: float
    p_base: float
    alpha: float
    """The level this suite was tested at: that of the look; in a gain suite after Holm."""
    margin: float
    """Of a gain suite the default one, for its `recall`."""
    decision: Decision
    reason: str
    method: str
    needed: int
    """Items with which non-inferiority could be expected to be shown, had nothing changed; 0 for gain suites."""
    chance: float = 0.0
    """What guessing would score."""
    by_view: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Score before and after for each way of asking."""
    improved: int = 0
    """Answers that went from wrong to right, and the other way round."""
    worsened: int = 0
    worst: tuple[Regression, ...] = ()
    statistic: Change | None = None
    """Of a gain suite: what its gain is tested on, against the incumbent."""
    recall: Change | None = None
    """Of a gain suite: its metric, and whether a loss of the margin is excluded."""
    best: str = ""
    """Adapter of the best release so far by this suite; empty where it is the incumbent, or there was none."""
    best_release: Change | None = None
    """The metric from the best release to the candidate, and whether a loss of the margin is excluded."""

    @property
    def margin_left(self) -> float | None:
        """What the worst of the lower bounds leaves of the margin; below 0 it is used up. None for a gain suite."""
        lows = [self.ci_low, self.ci_base_low, *([self.best_release.ci_low] if self.best_release else [])]
        return min(lows) + self.margin if self.role == "retention" else None


@dataclass(frozen=True, slots=True)
class CrossVersion:
    """Recall at `k` of texts in images, over retrieval suites, by the versions of both; see
    :mod:`updater.gate.clip`. Shares from 0 to 1.
    """

    n: int
    """Texts that were asked."""
    k: int
    old_old: float
    """The incumbent's texts in the incumbent's images: searches before the release."""
    new_old: float
    """The candidate's texts in the incumbent's images: searches at the beginning of a backfill."""
    new_new: float
    """The candidate's texts in the candidate's images: searches after it."""
    ci_low: float
    """One-sided lower bound of `new_old - old_old`."""
    margin: float

    @property
    def allowed(self) -> bool:
        """Whether searches may begin before the backfill: a loss of the margin is excluded."""
        return self.ci_low > -self.margin

    def summary(self) -> dict[str, float | int | bool]:
        """What the ledger keeps."""
        return {
            "n": self.n, "k": self.k, "old_old": self.old_old, "new_old": self.new_old, "new_new": self.new_new,
            "ci_low": self.ci_low, "margin": self.margin, "allowed": self.allowed,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of one gate run."""

    outcome: GateOutcome
    reasons: tuple[str, ...]
    candidate: str
    incumbent: str | None
    """None is the base alone."""
    base: str
    suites: tuple[SuiteResult, ...]
    checks: tuple[Check, ...]
    alpha: float
    look: Look
    """Which look at the candidate this is, its level, and what looks have spent and may still spend."""
    candidates: int
    """Others that were looked at since the last release, before this one."""
    fresh: int
    """Independent items of the look that are new samples; others are of gain suites of the user."""
    seconds: float
    created_at: str
    cost: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    cross_version: CrossVersion | None = None
    """How the candidate's texts find images that the incumbent embedded; None where the image tower is the same."""
    gain: PooledGain | None = None
    """The test over all gain suites; None where there is none, or nothing was scored."""
    spent: bool = True
    """Whether the look was made, and spent its part of alpha: it could have passed by its tests. False where a check
    that looks at no answers failed, or there were too few items for a test that a pass needs."""
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    """What is told beside, and decides nothing."""

    @property
    def caught_by(self) -> tuple[str, ...]:
        """Names of what kept the candidate out: failed checks and suites; if nothing failed, what is unproven, `gain`
        for the test over all gain suites.
        """
        failed = [check.name for check in self.checks if not check.ok]
        failed += [suite.name for suite in self.suites if suite.decision == "failed"]
        if failed or self.outcome == "passed":
            return tuple(failed)
        unproven = [s.name for s in self.suites if s.role == "retention" and s.decision == "inconclusive"]
        return (*unproven, *(["gain"] if self.gain is None or self.gain.decision != "passed" else []))

    def look_summary(self) -> dict[str, Any]:
        """The look, and what follows from it. Where it was not made it has spent nothing."""
        spent = self.look.spent if self.spent else self.look.before
        taken = self.candidates + (self.spent or self.look.number > 1)
        return {
            **asdict(self.look), "spent": spent, "left": self.look.alpha - spent, "next": self.look.next,
            "fresh": self.fresh, "candidates": self.candidates, "made": self.spent,
            "left_for_others": alpha_left(self.alpha, taken),
        }  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values (NaN and infinity become None: JSON has no words for them)."""
        value = jsonable({**asdict(self), "look": self.look_summary()})
        value["caught_by"] = list(self.caught_by)
        assert isinstance(value, dict)
        return value

    def summary(self) -> dict[str, Any]:
        """What the ledger keeps: short, without thumbnails."""
        suites = {
            suite.name: {
                "role": suite.role,
                "metric": suite.metric,
                "n": suite.n,
                "units": suite.units,
                "base": suite.base,
                "before": suite.before,
                "after": suite.after,
                "difference": suite.difference,
                "ci": [suite.ci_low, suite.ci_high],
                "margin": suite.margin,
                "margin_left": suite.margin_left,
                "decision": suite.decision,
                **({"statistic": asdict(suite.statistic)} if suite.statistic else {}),
                **({"recall": asdict(suite.recall)} if suite.recall else {}),
                **({"best": suite.best, "best_release": asdict(suite.best_release)} if suite.best_release else {}),
            }
            for suite in self.suites
        }
        value = jsonable(
            {
                "outcome": self.outcome,
                "reasons": list(self.reasons),
                "caught_by": list(self.caught_by),
                "alpha": self.alpha,
                "look": self.look_summary(),
                "spent": self.spent,
                "seconds": self.seconds,
                "suites": suites,
                "gain": self.gain.summary() if self.gain else None,
                "checks": {check.name: check.ok for check in self.checks},
                "diagnostics": without_pictures(asdict(self.diagnostics)),
                "cross_version": None
                if self.cross_version is None
                else {**self.cross_version.summary(), "incumbent": self.incumbent},
            }
        )
        assert isinstance(value, dict)
        return value


def jsonable(value: Any) -> Any:
    """Plain JSON values: tuples become lists, floats are finite and rounded to 6 significant digits."""
    if isinstance(value, dict):
        return {str(key): jsonable(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(child) for child in value]
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return str(value)
