"""Merges the trained delta with the served one, by a rule that the recipe names.

A rule is a function ``(served, trained, start, weight, **options) -> delta`` over
:class:`updater.adapters.WeightDelta`, all differences to the base; ranks may add up, the writer compresses them. One
that depends on earlier updates is a class derived from :class:`RememberingRule`. The weight may be searched as in
WiSE-FT and PAINT: every weight is scored (the function is in ``updater/service/gate_update.py``), the best one kept.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from torch import Tensor

from core.progress import progress_log
from updater.adapters.weight_deltas import WeightDelta, merge
from updater.recipes import Merge
from updater.recipes.plugin_registry import Methods

NONE = "none"
Memory = Mapping[str, Tensor]
"""A rule's memory of the updates so far, from their carry-over; empty before the first one."""


class RememberingRule(ABC):
    """A rule that depends on all earlier updates. Keyword arguments of ``__init__`` are ``merge.options``."""

    @abstractmethod
    def remember(
        self, served: WeightDelta, trained: WeightDelta, start: WeightDelta, memory: Memory
    ) -> dict[str, Tensor]:
        """Add this update to the memory."""

    @abstractmethod
    def __call__(self, served: WeightDelta, trained: WeightDelta, weight: float, memory: Memory) -> WeightDelta:
        """Return the delta to serve next. ``memory`` includes this update."""


def linear(
    served: WeightDelta, trained: WeightDelta, start: WeightDelta, weight: float, towards: str = "served"
) -> WeightDelta:
    """Linear interpolation: ΔW = (1 - weight) ΔW_other + weight ΔW_trained, exactly. ``towards``: the other end,
    ``served`` (EMA merge; PAINT, Ilharco et al. 2022) or ``base``, whose ΔW is 0 (WiSE-FT, Wortsman et al. 2022)."""
    if towards not in ("served", "base"):
        raise TypeError(f"towards is {towards!r}, not one of served, base")
    return merge(served if towards == "served" else {}, trained, weight)


RULES: Final[Methods[Any]] = Methods("merging", "merge rule", {"linear": linear})


def merged(
    merge: Merge, served: WeightDelta, trained: WeightDelta, start: WeightDelta, memory: Memory | None = None
) -> WeightDelta:
    """Return the delta to serve after an update. Raises ConfigError for an unknown rule or option. ``memory``: result
    of :func:`remembered` for this update; None without memory."""
    if merge.rule == NONE:
        return trained
    rule = _rule(merge)
    with RULES.options_of(merge.rule):
        if isinstance(rule, RememberingRule):
            memory = rule.remember(served, trained, start, {}) if memory is None else memory
            return rule(served, trained, merge.weight, memory)
        return rule(served, trained, start, merge.weight, **merge.options)  # type: ignore[no-any-return]


def remembered(
    merge: Merge, served: WeightDelta, trained: WeightDelta, start: WeightDelta, memory: Memory
) -> dict[str, Tensor]:
    rule = None if merge.rule == NONE else _rule(merge)
    return rule.remember(served, trained, start, memory) if isinstance(rule, RememberingRule) else {}


def _rule(merge: Merge) -> Any:
    rule = RULES.find(merge.rule)
    if not isinstance(rule, type):
        return rule
    with RULES.options_of(merge.rule):
        return rule(**merge.options)


class Scored(Protocol):
    """Scores an adapter directory, higher is better; deterministic for a directory."""

    @property
    def passes(self) -> int:
        """Forward passes of one sample per call."""

    def __call__(self, directory: Path) -> float:
        pass


@dataclass(frozen=True)
class Searched:
    """Result of a search. Without one, ``scores`` is empty and ``merge`` the recipe's."""

    merge: Merge
    scores: dict[float, float]
    seconds: float = 0.0
    passes: int = 0

    def to_json(self, sample_gflops: float) -> dict[str, Any]:
        """Cost for the ledger; empty without a search. Like the gate's, its passes are not charged."""
        if not self.scores:
            return {}
        return {
            "merge_weight": self.merge.weight,
            "search_scores": {f"{weight:g}": score for weight, score in self.scores.items()},
            "search_gflops": self.passes * sample_gflops,
            "search_seconds": self.seconds,
        }


def search(
    merge: Merge,
    scored: Scored | None,
    write: Callable[[Merge, Path], str],
    folder: Path,
    between: Callable[[], None] = lambda: None,
) -> Searched:
    """Return the best of ``merge.search``, the first among equals; ``merge`` unchanged if nothing can be scored.
    ``write``: writes the adapter of a merge into a directory. ``between``: called after each score (duty cycle,
    signals)."""
    scores: dict[float, float] = {}
    began = time.monotonic()
    if scored is None or not merge.search or not scored.passes:
        return Searched(merge, scores)
    for weight in merge.search:
        directory = folder / f"weight-{weight:g}"
        write(merge.model_copy(update={"weight": weight}), directory)
        scores[weight] = scored(directory)
        between()
    best = max(merge.search, key=lambda weight: scores[weight])
    listed = ", ".join(f"{weight:g}: {100 * score:.1f}" for weight, score in scores.items())
    progress_log.info(f"merged with weight {best:g}, the best of {listed}")
    chosen = merge.model_copy(update={"weight": best})
    return Searched(chosen, scores, time.monotonic() - began, len(scores) * scored.passes)
