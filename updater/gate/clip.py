"""How a CLIP is gated: through `ClipEngine`, by classification and retrieval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import GateError
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from updater.adapters import trainer_encoder
from updater.gate.checks import (
    Encode,
    check_collapse,
    check_drift,
    check_finite,
    check_latency,
    check_loads,
    check_parity,
    check_size,
)
from updater.gate.cross_version import measure_cross_version
from updater.gate.decision import Scores
from updater.gate.diagnostics.feature_shift import feature_shift
from updater.gate.diagnostics.pair_accuracy import pair_accuracy
from updater.gate.diagnostics.results import Diagnostics
from updater.gate.evaluator import PROBE, probe
from updater.gate.regressions import worst_items
from updater.gate.score import Outcomes, Scorer
from updater.gate.suite_items import Item
from updater.gate.suites import Family, Suite
from updater.gate.verdict import Check, CrossVersion, Regression

LATENCY_BATCH = 8


class ClipEvaluator:
    """Asks the models in a `ClipEngine`. See :class:`updater.gate.evaluator.Evaluator`."""

    family: Family = "clip"

    def __init__(self, engine: ClipEngine, *, parity: Encode | None = None, cache: Path | None = None) -> None:
        """`parity`: the trainer's model, to compare with what the engine serves; `cache`: folder of kept scores,
        by default the suite's own, `home/cache/gate`."""
        self.engine = engine
        self.parity = parity
        self.scorer = Scorer(engine, cache)

    @property
    def base(self) -> ClipBase:
        """The base of all its models."""
        return self.engine.base

    def load(self, name: str, directory: Path, *, candidate: bool = False) -> None:
        """Make an adapter resident. Raises AdapterError."""
        self.engine.load(name, directory)
        if candidate:
            self.parity = trainer_encoder(self.base, directory)

    def score(self, suite: Suite, adapter: str | None, *, label: str = "") -> Outcomes:
        """Ranks of the right answers."""
        return self.scorer.score(suite, adapter, label=label)

    def chance(self, suite: Suite) -> float:
        """Expected score of random answers."""
        return self.scorer.chance(suite)

    def diagnostics(self, scores: Sequence[Scores], incumbent: str | None, candidate: str) -> Diagnostics:
        """Pairs that look alike to the base, and how far the features moved."""
        suites = [each.suite for each in scores]
        pairs = {
            suite.name: pair_accuracy(self.scorer, suite, incumbent, candidate)
            for suite in suites
            if suite.task == "retrieval"
        }
        return Diagnostics(
            pairs={name: each for name, each in pairs.items() if each is not None},
            shift=feature_shift(self.scorer, suites, incumbent, candidate),
        )

    def regressions(self, suite: Suite, before: Outcomes, after: Outcomes) -> tuple[Regression, ...]:
        """Hits that became misses."""
        return worst_items(self.scorer, suite, before, after)

    def answer_checks(self, candidate: str, suites: Sequence[Suite]) -> list[Check]:
        """None: vectors tell all, before any suite is scored."""
        return []

    def cross_version(
        self, suites: Sequence[Suite], incumbent: str | None, candidate: str, margin: float, level: float
    ) -> CrossVersion | None:
        """Of an update of the image tower."""
        return measure_cross_version(self.scorer, suites, incumbent, candidate, margin=margin, level=level)

    def checks(self, candidate: str, suites: Sequence[Suite], facts: Mapping[str, Any]) -> list[Check]:
        """loads, finite, collapse of each tower, norm drift, parity, latency, size."""
        engine, scorer = self.engine, self.scorer
        checks = [check_loads(candidate in engine.resident, candidate, facts)]
        few = _few(suites)
        if not checks[0].ok or len(few) < 2:
            return checks
        texts = sorted({item.text for item in few})
        pixels = np.stack([scorer.pixels(item) for item in few])
        base_images, base_texts = scorer.images(few, None), scorer.texts(texts, None)
        try:
            images, words = scorer.images(few, candidate), scorer.texts(texts, candidate)
            checks.append(check_finite(images, words))
            if not checks[-1].ok:
                return checks
            checks.append(check_collapse("image", base_images, images))
            if len(texts) > 2:
                checks.append(check_collapse("text", base_texts, words))
            checks.append(check_drift(engine.model(None).state_dict(), engine.model(candidate).state_dict()))
            if self.parity is not None:
                checks.append(check_parity(self.parity, pixels[:16], texts[:16], (images[:16], words[:16])))
            short = [text[:100] for text in texts[:LATENCY_BATCH]]
            checks.append(check_latency(engine, candidate, pixels[:LATENCY_BATCH], short))
            checks.append(check_size(facts.get("rank"), facts.get("bytes")))
        except GateError:
            raise
        except Exception as error:  # a candidate that breaks the engine is rejected, with a report
            checks.append(Check("finite", False, f"the candidate failed on the probe: {error!r}"[:300]))
        return checks


def _few(suites: Sequence[Suite]) -> list[Item]:
    chosen: dict[str, Item] = {}
    for _, items in probe(suites):
        for item in items:
            chosen.setdefault(item.id, item)
    return list(chosen.values())[:PROBE]
