"""Whether an engine in half precision answers the gate's suites as float32 does: what is gated is what is served."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from serving.engines.backends import FLOAT32, EngineChoice
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from updater.gate.score import Scorer
from updater.gate.suites import Suite

ITEMS: Final = 300
"""Of a suite, at most: a minute or two for a ViT-B-32 on two cores."""


@dataclass(frozen=True, slots=True)
class EngineScore:
    """What the base alone scores on one suite, in [0, 1]."""

    suite: str
    items: int
    float32: float
    served: float
    noise: float
    """Standard error of float32's score, by the items that were drawn; at least one item's worth."""

    @property
    def within_noise(self) -> bool:
        """Whether both scores are equal but for what other items would have changed as well."""
        return abs(self.served - self.float32) <= self.noise


def engine_scores(base: ClipBase, choice: EngineChoice, suites: Sequence[Suite], threads: int) -> list[EngineScore]:
    """The base's scores by an engine beside those by torch in float32.

    Raises:
        GateError: an image of a suite cannot be read.
    """
    limited = [suite.model_copy(update={"limit": min(suite.limit, ITEMS)}) for suite in suites]
    scores: list[list[tuple[int, float]]] = []
    for each in (FLOAT32, choice):
        scorer = Scorer(ClipEngine(base, threads=threads, choice=each))
        outcomes = [scorer.score(suite, None, label=str(each)) for suite in limited]
        scores.append([(len(outcome.ids), float(outcome.hits.mean())) for outcome in outcomes])
    return [
        EngineScore(suite.name, items, plain, served, max(math.sqrt(plain * (1 - plain) / items), 1 / items))
        for suite, (items, plain), (_, served) in zip(limited, *scores, strict=True)
    ]
