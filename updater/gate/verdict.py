"""A verdict as plain data, for the ledger, the console and the report. Shares, scores and differences are from 0 to 1
(0.05 = 5 points)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from core.ledger.rows import GateOutcome
from serving.engines.calibration import Kind, MatchCurve
from updater.gate.crossings import CrossVersion
from updater.gate.interim_analyses import InterimAnalysis, alpha_left

Decision = Literal["passed", "failed", "inconclusive"]
TAIL_BINS = ("never", "1-9", "10-99", "100+")
"""Bins by the number of times that a concept was seen, the rarest first."""
PAIR_CHANCE = 0.25
"""Score of guessing pairs: both of two."""
MEAN, SOURCES = "mean loss", "sources"
YES_BOUND = 0.1
"""Movement of a share of "yes" away from the truth that gives a warning."""


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
    """An item that was right before and is wrong now. For a sample of the store only IDs are kept; its texts and
    thumbnail are read when the report is shown (:mod:`updater.gate.report`), so that a deleted sample is in no report.
    """

    id: str
    text: str
    view: str
    rank_before: int
    """0-based rank of the right answer; 0 is right. For a free answer 0 if it is right, 1 if not."""
    rank_after: int
    answer_before: str
    answer_after: str
    thumbnail: str
    """JPEG data URI, at most 96 px; empty if the image could not be read."""
    expected: str = ""
    sample: str = ""
    """ID in the sample store; empty for an item of a folder."""
    sample_before: str = ""
    """The sample whose caption or image was the answer, in retrieval over samples."""
    sample_after: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    name: str
    before: float
    after: float
    difference: float
    ci_low: float
    ci_high: float
    p: float
    """H0 of a `statistic`: there is no gain; otherwise: the loss is at least the margin."""


@dataclass(frozen=True, slots=True)
class PooledGain:
    decision: Decision
    reason: str
    n: int
    units: int
    strata: dict[str, int]
    statistic: Change
    recall: Change
    margin: float
    alpha: float
    method: str
    spread: float
    recall_spread: float

    def summary(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in ("reason", "n", "alpha", "method")}


@dataclass(frozen=True, slots=True)
class MeanLoss:
    """The test of the mean loss over the retention suites, weighted by independent items."""

    decision: Decision
    reason: str
    n: int
    units: int
    suites: int
    references: dict[str, Change]
    """By the reference's description."""
    margin: float
    alpha: float
    method: str
    needed: int
    """Items expected to show non-inferiority if nothing had changed."""

    @property
    def margin_left(self) -> float:
        return min(change.ci_low for change in self.references.values()) + self.margin

    def summary(self) -> dict[str, Any]:
        kept = {name: value for name, value in asdict(self).items() if name not in ("reason", "alpha", "method")}
        return {**kept, "margin_left": self.margin_left}


@dataclass(frozen=True, slots=True)
class SourceAgreement:
    """How far the base agrees with the held-out labels of a source, or of several small ones, in a new domain."""

    suite: str
    source: str
    """Empty for samples that name none, and for several sources."""
    sources: int
    n: int
    units: int
    base: float
    chance: float
    p: float
    """H0: the base is right no more often than by chance."""
    trusted: bool
    others: float | None
    """Score of the base on the domain's other sources; None without any."""
    p_others: float
    """H0: above chance, the base agrees no less than with the other sources."""
    lower: bool = False
    """True if it is shown to agree less (Holm over the sources of a domain)."""
    reason: str = ""
    """Why the verdict does not pass; empty if it may."""

    def summary(self) -> dict[str, Any]:
        return {**{name: value for name, value in asdict(self).items() if name != "reason"}, "held": bool(self.reason)}


@dataclass(frozen=True, slots=True)
class Suspect:
    source: str
    samples: int
    harm: float
    """Mean loss of the suites that got worse after a short training on this source alone, as a share of their score;
    below 0 it helps them."""


@dataclass(frozen=True, slots=True)
class Blame:
    """The sources of an update's new samples, the most harmful first."""

    items: int
    """That got worse."""
    suspects: tuple[Suspect, ...]
    source: str | None
    """The one that stands out; None: the regression is not that of one source."""


@dataclass(frozen=True, slots=True)
class SuiteResult:
    name: str
    role: str
    task: str
    metric: str
    description: str
    half: str
    n: int
    units: int
    base: float
    before: float
    after: float
    difference: float
    ci_low: float
    """One-sided bounds at `alpha`: [ci_low, ci_high] is a two-sided 1 - 2 alpha interval."""
    ci_high: float
    difference_base: float
    ci_base_low: float
    ci_base_high: float
    p: float
    """Retention: p of a loss of at least the margin, the largest over the references. Gain: p of no gain."""
    p_incumbent: float
    p_base: float
    alpha: float
    """Level of this suite's test: that of the look; in a gain suite after Holm."""
    margin: float
    """In a gain suite the default, for its `recall`."""
    decision: Decision
    reason: str
    method: str
    needed: int
    """Items expected to show non-inferiority if nothing had changed; 0 for gain suites."""
    chance: float = 0.0
    by_view: dict[str, tuple[float, float]] = field(default_factory=dict)
    improved: int = 0
    """Answers that went from wrong to right; `worsened` vice versa."""
    worsened: int = 0
    worst: tuple[Regression, ...] = ()
    statistic: Change | None = None
    """In a gain suite: the quantity whose gain is tested, against the incumbent."""
    recall: Change | None = None
    best: str = ""
    """Adapter of the best release so far by this suite; empty if it is the incumbent, or there was none."""
    best_release: Change | None = None
    """The metric from the best release to the candidate, and whether a loss of the margin is excluded."""
    used: int = 0
    """Earlier judgements that these items were asked for, about this model or an older one."""

    @property
    def margin_left(self) -> float | None:
        """Distance of the lowest bound from the margin, negative beyond it. None for a gain suite."""
        lows = [self.ci_low, self.ci_base_low, *([self.best_release.ci_low] if self.best_release else [])]
        return min(lows) + self.margin if self.role == "retention" else None

    def summary(self) -> dict[str, Any]:
        names = (
            "role", "metric", "n", "units", "base", "before", "after", "difference", "margin", "margin_left", "used",
            "decision",
        )  # fmt: skip
        changes = {name: getattr(self, name) for name in ("statistic", "recall", "best_release")}
        return {
            **{name: getattr(self, name) for name in names},
            "ci": [self.ci_low, self.ci_high],
            **{name: asdict(change) for name, change in changes.items() if change},
            **({"best": self.best} if self.best_release else {}),
        }


@dataclass(frozen=True, slots=True)
class Interval:
    """The candidate compared with the incumbent. The interval holds 90%: 5% are beyond each end."""

    before: float
    after: float
    difference: float
    ci_low: float
    ci_high: float


@dataclass(frozen=True, slots=True)
class TailBin:
    name: str
    n: int
    units: int
    score: Interval


@dataclass(frozen=True, slots=True)
class Tail:
    rows: int
    counted: int
    """Training samples that were read; counts are scaled up if these are fewer."""
    suites: dict[str, tuple[TailBin, ...]]


@dataclass(frozen=True, slots=True)
class PairImage:
    """One image of a pair. A sample of the store has only its ID, see :class:`Regression`."""

    text: str
    thumbnail: str
    sample: str = ""


@dataclass(frozen=True, slots=True)
class ShownPair:
    first: PairImage
    second: PairImage
    image_similarity: float
    right_before: bool


@dataclass(frozen=True, slots=True)
class PairAccuracy:
    """Share of look-alike pairs of a retrieval suite in which both images find their own caption."""

    n: int
    base: float
    score: Interval
    improved: int
    worsened: int
    shown: tuple[ShownPair, ...] = ()


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
        """Increase of the distance from the truth; negative if the share moved closer."""
        return abs(self.after - self.truth) - abs(self.before - self.truth)


@dataclass(frozen=True, slots=True)
class TowerShift:
    n: int
    from_incumbent: float
    from_base: float
    rank_before: float
    """Effective rank of the incumbent's features (:func:`updater.gate.checks.effective_rank`)."""
    rank_after: float


@dataclass(frozen=True, slots=True)
class FeatureShift:
    """Movement of both towers' features in an update, and the gap between them."""

    towers: dict[str, TowerShift]
    gap_before: float
    gap_after: float


@dataclass(frozen=True, slots=True)
class Diagnostics:
    tail: Tail | None = None
    pairs: dict[str, PairAccuracy] = field(default_factory=dict)
    yes: dict[str, YesShare] = field(default_factory=dict)
    shift: FeatureShift | None = None
    calibration: dict[Kind, MatchCurve] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        value = asdict(self)
        for pair in value["pairs"].values():
            del pair["shown"]
        for curve in value["calibration"].values():
            del curve["similarity"], curve["probability"]
        return value


@dataclass(frozen=True, slots=True)
class Verdict:
    outcome: GateOutcome
    reasons: tuple[str, ...]
    candidate: str
    incumbent: str | None
    base: str
    suites: tuple[SuiteResult, ...]
    checks: tuple[Check, ...]
    alpha: float
    look: InterimAnalysis
    """Number and level of this look at the candidate, and the alpha spent and left."""
    candidates: int
    fresh: int
    """Independent items of the look that are new samples; others come from gain suites of the user."""
    seconds: float
    created_at: str
    cost: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    cross_version: CrossVersion | None = None
    """Recall of the candidate's texts among the incumbent's images; None if they share the image tower."""
    gain: PooledGain | None = None
    """The test over all gain suites; None without any, or if nothing was scored."""
    mean: MeanLoss | None = None
    """The test of the mean over all retention suites; None without any, or if nothing was scored."""
    trust: tuple[SourceAgreement, ...] = ()
    blame: Blame | None = None
    """By source of each new domain."""
    spent: bool = True
    """True if the look counts and spent its part of alpha, because its tests could have passed. False if a check before
    scoring failed, or there were too few items."""
    diagnostics: Diagnostics = field(default_factory=Diagnostics)

    @property
    def caught_by(self) -> tuple[str, ...]:
        """Names of failed checks and suites or, if nothing failed, of unproven ones; `gain` is the test over all gain
        suites, and `sources` stands for labels that the base does not agree with."""
        failed = [check.name for check in self.checks if not check.ok]
        failed += [suite.name for suite in self.suites if suite.decision == "failed"]
        failed += [MEAN] if self.mean is not None and self.mean.decision == "failed" else []
        if failed or self.outcome == "passed":
            return tuple(failed)
        unproven = [s.name for s in self.suites if s.role == "retention" and s.decision == "inconclusive"]
        unproven += [MEAN] if self.mean is not None and self.mean.decision != "passed" else []
        unproven += ["gain"] if self.gain is None or self.gain.decision != "passed" else []
        return tuple(unproven) or ((SOURCES,) if any(source.reason for source in self.trust) else ())

    def look_summary(self) -> dict[str, Any]:
        """The look and its consequences. A look that does not count has spent nothing."""
        spent = self.look.spent if self.spent else self.look.before
        taken = self.candidates + (self.spent or self.look.number > 1)
        return {
            **asdict(self.look), "spent": spent, "left": self.look.alpha - spent, "next": self.look.next,
            "fresh": self.fresh, "candidates": self.candidates, "made": self.spent,
            "left_for_others": alpha_left(self.alpha, taken),
        }  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """All values as JSON; NaN and infinity become None."""
        everything = {
            **asdict(self), "look": self.look_summary(), "caught_by": self.caught_by,
            "cross_version": self.cross_version and self.cross_version.summary(),
        }  # fmt: skip
        return {name: jsonable(value) for name, value in everything.items()}

    def summary(self) -> dict[str, Any]:
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
            "mean": self.mean.summary() if self.mean else None,
            "trust": [source.summary() for source in self.trust],
            "blame": self.blame and asdict(self.blame),
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
    for kind, curve in diagnostics.get("calibration", {}).items():
        error, low, high = (100 * curve[name] for name in ("error", "ci_low", "ci_high"))
        yield (
            f"probability of a match, {kind}: expected calibration error {error:.1f} [{low:.1f}, {high:.1f}] points "
            f"({curve['queries']} queries)"
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
