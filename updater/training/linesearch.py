"""A line search over the weight of a merge, as WiSE-FT and PAINT do it: every weight is scored, the best one kept.

What scores is handed in: training knows nothing of the gate (``updater/service/gate_update.py``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from core.errors import ConfigError
from core.progress import say
from updater.recipes import Merge, Recipe


class Scored(Protocol):
    """Scores an adapter directory; the higher the better. The same directory has the same score."""

    @property
    def passes(self) -> int:
        """Forward passes of one sample that a call takes."""

    def __call__(self, directory: Path) -> float:
        """The score of the adapter in ``directory``."""


@dataclass(frozen=True)
class Searched:
    """What a search came to. Without one, ``scores`` is empty and ``merge`` the recipe's."""

    merge: Merge
    scores: dict[float, float]
    seconds: float = 0.0
    passes: int = 0

    def to_json(self, sample_gflops: float) -> dict[str, Any]:
        """What the ledger tells of it; empty when there was none. Like the gate's, its passes are not charged."""
        if not self.scores:
            return {}
        return {
            "merge_weight": self.merge.weight,
            "search_scores": {f"{weight:g}": score for weight, score in self.scores.items()},
            "search_gflops": self.passes * sample_gflops,
            "search_seconds": self.seconds,
        }


def check_searchable(recipe: Recipe, scored: Scored | None) -> None:
    """Raises ConfigError when a recipe searches and there is nothing to score with."""
    if recipe.merge.search and scored is None:
        raise ConfigError(
            f"recipe {recipe.name!r}: merge.search wants suites to score on, and there are none here.",
            "Run it through the updater, or leave merge.search out: merge.weight is then used as it is.",
        )


def search(
    merge: Merge,
    scored: Scored | None,
    write: Callable[[Merge, Path], str],
    folder: Path,
    between: Callable[[], None] = lambda: None,
) -> Searched:
    """The best of ``merge.search``, among equals the one listed first; ``merge`` as it is where nothing can be asked.

    Args:
        write: writes the adapter that a merge makes, into a directory.
        between: called after each score (duty cycle, signals).
    """
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
    say(f"merged with weight {best:g}, the best of {listed}")
    chosen = merge.model_copy(update={"weight": best})
    return Searched(chosen, scores, time.monotonic() - began, len(scores) * scored.passes)
