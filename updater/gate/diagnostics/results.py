"""What a verdict tells beside its decision, as plain data and as lines of text. Shares and cosines are from 0 to 1
(0.05 = 5 points).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

TAIL_BINS = ("never", "1-9", "10-99", "100+")
"""How often a concept was seen, the rarest first."""
PAIR_CHANCE = 0.25
"""What guessing gets of pairs: both of two."""
YES_BOUND = 0.1
"""A share of "yes" that moved away from the truth by more than this is a warning."""


@dataclass(frozen=True, slots=True)
class Interval:
    """The candidate beside the incumbent. The interval holds 90%: 5% lie beyond each of its ends."""

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
    """Whether the incumbent did."""


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
    """How often a VLM's answer to the yes/no questions of a suite begins with yes."""

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
    """How far an update moved the features of both towers, and how they lie to each other."""

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
    """What an operator should look at; also what could not be computed."""


def without_pictures(value: dict[str, Any]) -> dict[str, Any]:
    """Diagnostics as a mapping, without the pairs that are shown: what the ledger keeps."""
    pairs = {name: {k: v for k, v in pair.items() if k != "shown"} for name, pair in value["pairs"].items()}
    return {**value, "pairs": pairs}


def diagnostics_lines(diagnostics: Mapping[str, Any]) -> Iterator[str]:
    """What is told beside a verdict, from its summary or its report; nothing of a verdict of an earlier version."""
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
