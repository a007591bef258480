"""A verdict as plain data, which the ledger, the console and the report read; its diagnostics decide nothing.

Shares, scores and differences are from 0 to 1 (0.05 = 5 points).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from core.ledger.rows import GateOutcome
from updater.gate.interim_analyses import InterimAnalysis, alpha_left

Decision = Literal["passed", "failed", "inconclusive"]
TAIL_BINS = ("never", "1-9", "10-99", "100+")
"""Bins by the number of times that a concept was seen, the rarest first."""
PAIR_CHANCE = 0.25
"""Score of guessing pairs: both of two."""
YES_BOUND = 0.1
"""A share of "yes" that moved away from the truth by more than this is a warning."""


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
    """The question: "class", "image to text", "text to image" or "answer"."""
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
    """The quantity: a metric, or the rank statistic."""
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
    """The test over all gain suites together; it decides whether there is a gain."""

    decision: Decision
    reason: str
    n: int
    units: int
    """Independent captions, images or items."""
    strata: dict[str, int]
    """Units of each suite: its weight in the mean."""
    statistic: Change
    """The measure that must become better."""
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
        """The part that the ledger keeps."""
        return {name: value for name, value in asdict(self).items() if name not in ("reason", "n", "alpha", "method")}


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """The result of one suite. Scores and differences are shares (0.05 = 5 points)."""

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
    """Score of guessing."""
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
        """The part of the margin that the lowest bound leaves; below 0 it is used up. None for a gain suite."""
        lows = [self.ci_low, self.ci_base_low, *([self.best_release.ci_low] if self.best_release else [])]
        return min(lows) + self.margin if self.role == "retention" else None

    def summary(self) -> dict[str, Any]:
        """The part that the ledger keeps."""
        names = ("role", "metric", "n", "units", "base", "before", "after", "difference", "margin", "margin_left")
        changes = {name: getattr(self, name) for name in ("statistic", "recall", "best_release")}
        return {
            **{name: getattr(self, name) for name in (*names, "decision")},
            "ci": [self.ci_low, self.ci_high],
            **{name: asdict(change) for name, change in changes.items() if change},
            **({"best": self.best} if self.best_release else {}),
        }


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
        """True if searches may begin before the backfill: a loss of the margin is excluded."""
        return self.ci_low > -self.margin

    def summary(self) -> dict[str, float | int | bool]:
        """The part that the ledger keeps."""
        return {**asdict(self), "allowed": self.allowed}


@dataclass(frozen=True, slots=True)
class Interval:
    """The candidate compared with the incumbent. The interval holds 90%: 5% lie beyond each of its ends."""

    before: float
    after: float
    difference: float
    ci_low: float
    ci_high: float


@dataclass(frozen=True, slots=True)
class TailBin:
    """The items of a suite whose concept the training data name about equally often."""

    name: str
    """One of TAIL_BINS."""
    n: int
    units: int
    """Independent captions, images or items."""
    score: Interval
    """Of the suite's metric."""


@dataclass(frozen=True, slots=True)
class Tail:
    """The results of suites by how often their concepts were seen in training."""

    rows: int
    """Training samples of the store."""
    counted: int
    """Of them, those that were looked at; counts are scaled up where these are fewer."""
    suites: dict[str, tuple[TailBin, ...]]
    """By suite, the bins that have items, the rarest first."""


@dataclass(frozen=True, slots=True)
class PairImage:
    """One image of a pair. A sample of the store has its id alone, see :class:`updater.gate.verdict.Regression`."""

    text: str
    thumbnail: str
    sample: str = ""


@dataclass(frozen=True, slots=True)
class ShownPair:
    """A pair that the candidate does not tell apart."""

    first: PairImage
    second: PairImage
    image_similarity: float
    """Cosine of both images by the base."""
    right_before: bool
    """The incumbent did."""


@dataclass(frozen=True, slots=True)
class PairAccuracy:
    """Pairs of a retrieval suite that look alike to the base: the share of which both images find their own caption."""

    n: int
    base: float
    score: Interval
    improved: int
    worsened: int
    shown: tuple[ShownPair, ...] = ()
    """Some that the candidate gets wrong; those that were right before come first."""


@dataclass(frozen=True, slots=True)
class YesShare:
    """Shares of a VLM's answers to the yes/no questions of a suite that begin with yes."""

    n: int
    truth: float
    base: float
    before: float
    after: float

    @property
    def moved_away(self) -> float:
        """By how much further it is from the truth than before; negative where it is nearer."""
        return abs(self.after - self.truth) - abs(self.before - self.truth)


@dataclass(frozen=True, slots=True)
class TowerShift:
    """Features of one tower on retention items."""

    n: int
    """Images, or texts."""
    from_incumbent: float
    """Mean of 1 - cosine between the incumbent's and the candidate's feature of an item."""
    from_base: float
    rank_before: float
    """Effective rank of the incumbent's features (:func:`updater.gate.checks.effective_rank`): how many directions
    they use."""
    rank_after: float


@dataclass(frozen=True, slots=True)
class FeatureShift:
    """Distances that an update moved the features of both towers, and between them."""

    towers: dict[str, TowerShift]
    """Of "image" and "text"."""
    gap_before: float
    """Distance between the mean image and the mean text feature of the incumbent, from 0 to 2."""
    gap_after: float


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """Everything of one verdict; what could not be asked is absent."""

    tail: Tail | None = None
    pairs: dict[str, PairAccuracy] = field(default_factory=dict)
    """By retrieval suite."""
    yes: dict[str, YesShare] = field(default_factory=dict)
    """By suite with yes/no questions."""
    shift: FeatureShift | None = None
    warnings: tuple[str, ...] = ()
    """For an operator to look at; also about measurements that failed."""

    def summary(self) -> dict[str, Any]:
        """The part that the ledger keeps: without the pairs that are shown."""
        value = asdict(self)
        for pair in value["pairs"].values():
            del pair["shown"]
        return value


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
    look: InterimAnalysis
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
    """Recall of the candidate's texts among images that the incumbent embedded; None where they share the tower."""
    gain: PooledGain | None = None
    """The test over all gain suites; None where there is none, or nothing was scored."""
    spent: bool = True
    """True if the look was made, and spent its part of alpha: it could have passed by its tests. False where a check
    that looks at no answers failed, or there were too few items for a test that a pass needs."""
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    """They decide nothing."""

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
        everything = {**asdict(self), "look": self.look_summary(), "caught_by": self.caught_by}
        return {name: jsonable(value) for name, value in everything.items()}

    def summary(self) -> dict[str, Any]:
        """The part that the ledger keeps: short, without thumbnails."""
        kept: dict[str, Any] = {
            "outcome": self.outcome,
            "reasons": self.reasons,
            "caught_by": self.caught_by,
            "alpha": self.alpha,
            "look": self.look_summary(),
            "spent": self.spent,
            "seconds": self.seconds,
            "suites": {suite.name: suite.summary() for suite in self.suites},
            "gain": self.gain.summary() if self.gain else None,
            "checks": {check.name: check.ok for check in self.checks},
            "diagnostics": self.diagnostics.summary(),
            "cross_version": self.cross_version and {**self.cross_version.summary(), "incumbent": self.incumbent},
        }
        return {name: jsonable(value) for name, value in kept.items()}


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


def diagnostics_lines(diagnostics: Mapping[str, Any]) -> Iterator[str]:
    """The diagnostics of a verdict's summary or report, for a terminal; of none, nothing."""
    if not diagnostics:
        return
    for warning in diagnostics["warnings"]:
        yield f"warning: {warning}"
    for suite, bins in ((diagnostics["tail"] or {}).get("suites") or {}).items():
        yield f"{suite}, concepts seen " + "; ".join(
            f"{each['name']} ({each['n']} items): {_moved(each['score'])}" for each in bins
        )
    for suite, pairs in diagnostics["pairs"].items():
        yield f"{suite}, {pairs['n']} pairs that look alike: {_moved(pairs['score'])}, base {pairs['base']:.1%}"
    for suite, yes in diagnostics["yes"].items():
        yield (
            f'{suite}, share of "yes": {yes["before"]:.1%} -> {yes["after"]:.1%}; truth {yes["truth"]:.1%}, '
            f"base {yes['base']:.1%}"
        )
    shift = diagnostics["shift"]
    for tower, moved in (shift["towers"] if shift else {}).items():
        yield (
            f"{tower} features moved by {moved['from_incumbent']:.4f} from the incumbent, {moved['from_base']:.4f} "
            f"from the base; effective rank {moved['rank_before']:.1f} -> {moved['rank_after']:.1f}"
        )
    if shift:
        yield f"modality gap {shift['gap_before']:.3f} -> {shift['gap_after']:.3f}"


def _moved(score: Mapping[str, float]) -> str:
    change, low, high = (100 * score[name] for name in ("difference", "ci_low", "ci_high"))
    return f"{score['before']:.1%} -> {score['after']:.1%} ({change:+.1f} [{low:+.1f}, {high:+.1f}])"
