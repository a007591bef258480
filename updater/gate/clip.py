"""How a CLIP is gated: through `ClipEngine`, by classification and retrieval; within one base, or across two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

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
    effective_rank,
)
from updater.gate.decision import Scores
from updater.gate.diagnostics.hard_pairs import pair_accuracy
from updater.gate.diagnostics.results import Diagnostics, FeatureShift, TowerShift
from updater.gate.evaluator import PROBE, probe
from updater.gate.regressions import worst_items
from updater.gate.score import Outcomes, Scorer, Vectors, prompt, rank_of_best
from updater.gate.statistics import compare_accuracy
from updater.gate.suite_items import Item, spread
from updater.gate.suites import Family, Suite
from updater.gate.verdict import Check, CrossVersion, Regression

LATENCY_BATCH = 8
CROSS_VERSION_ITEMS: Final = 600
"""Over all suites: images that the incumbent may have to embed once more, some seconds."""
SHIFT_ITEMS: Final = 128
"""Over all retention suites. A model whose answers came from the cache computes as many images and texts, a second."""


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


def measure_cross_version(
    scorer: Scorer, suites: Sequence[Suite], incumbent: str | None, candidate: str, *, margin: float, level: float
) -> CrossVersion | None:
    """Recall across versions: texts of a candidate among images that the incumbent embedded.

    A release that changes the image tower needs every image of the catalog embedded anew, which takes hours for a
    million. Where the candidate's texts find the incumbent's images as well as the incumbent's own texts do, searches
    need not wait for that: they may begin with the vectors that are there.

    Asks the retrieval suites. None where there is nothing to measure: both have one image space, or no suite is of
    retrieval.

    Args:
        margin: loss of recall that must be excluded.
        level: of the one-sided test.
    """
    engine = scorer.engine
    retrieval = [suite for suite in suites if suite.task == "retrieval"]
    if not retrieval or engine.spaces(incumbent).image == engine.spaces(candidate).image:
        return None
    hits = [
        _hits(scorer, suite, incumbent, candidate, max(2, CROSS_VERSION_ITEMS // len(retrieval))) for suite in retrieval
    ]
    old_old, new_old, new_new = (np.concatenate(column) for column in zip(*hits, strict=True))
    comparison = compare_accuracy(old_old, new_old, margin=margin)
    return CrossVersion(
        n=len(old_old), k=min(suite.k for suite in retrieval), old_old=comparison.before, new_old=comparison.after,
        new_new=float(new_new.mean()), ci_low=comparison.bounds(level)[0], margin=margin,
    )  # fmt: skip


def _hits(
    scorer: Scorer, suite: Suite, incumbent: str | None, candidate: str, most: int
) -> tuple[NDArray[np.float64], ...]:
    """Whether each text of a suite has a right image among its k nearest, by the versions of both."""
    items = spread(suite.items(), most)
    texts = sorted({item.text for item in items})
    right = np.array([[item.text == text for item in items] for text in texts])
    old_images = scorer.images(items, incumbent, f"{suite.name}, images of the incumbent")
    new_images = scorer.images(items, candidate, f"{suite.name}, images of the candidate")
    old_texts, new_texts = scorer.texts(texts, incumbent), scorer.texts(texts, candidate)
    pairs = ((old_texts, old_images), (new_texts, old_images), (new_texts, new_images))
    return tuple((rank_of_best(left @ images.T, right) < suite.k).astype(np.float64) for left, images in pairs)


def feature_shift(
    scorer: Scorer, suites: Sequence[Suite], incumbent: str | None, candidate: str
) -> FeatureShift | None:
    """How far an update moved the features of each tower, and whether they still spread; on a few items of every
    retention suite, with the texts that it asks. None where there are fewer than two.

    One tower that moves without the other is what RESTORE calls feature shift (Yang et al., Towards Feature Shift for
    Vision-Language Prompt Learning, 2024): image and text drift apart, and what the base could do goes.

    Raises ValueError for features that are not finite.
    """
    retention = [suite for suite in suites if suite.role == "retention"]
    chosen = [
        (item, item.text if suite.task == "retrieval" else prompt(suite.templates[0], suite, item.text))
        for suite in retention
        for item in spread(suite.items(), max(2, SHIFT_ITEMS // len(retention)))
    ]
    items = list({item.source: item for item, _ in chosen}.values())
    texts = sorted({text for _, text in chosen})
    if min(len(items), len(texts)) < 2:
        return None
    images = [scorer.images(items, name, "feature shift") for name in (None, incumbent, candidate)]
    words = [scorer.texts(texts, name, "feature shift") for name in (None, incumbent, candidate)]
    if not all(np.isfinite(features).all() for features in (*images, *words)):
        raise ValueError("features are not finite")
    return FeatureShift(
        {"image": _shift(*images), "text": _shift(*words)}, modality_gap(images[1], words[1]),
        modality_gap(images[2], words[2]),
    )  # fmt: skip


def mean_shift(before: Vectors, after: Vectors) -> float:
    """Mean of 1 - cosine between the rows of two L2-normalised arrays [n, dim]: 0 where nothing moved."""
    return float(1.0 - np.einsum("ij,ij->i", before, after, dtype=np.float64).mean())


def modality_gap(images: Vectors, texts: Vectors) -> float:
    """Distance between the means of two sets of L2-normalised features, from 0 to 2.

    Liang et al., Mind the Gap, NeurIPS 2022.
    """
    return float(np.linalg.norm(images.mean(axis=0, dtype=np.float64) - texts.mean(axis=0, dtype=np.float64)))


def _shift(base: Vectors, before: Vectors, after: Vectors) -> TowerShift:
    ranks = effective_rank(before), effective_rank(after)
    return TowerShift(len(after), mean_shift(before, after), mean_shift(base, after), *ranks)


def base_alone(base: ClipBase) -> str:
    """Name of the incumbent where nothing was released: the old base without an adapter."""
    return f"the base {base.name}"


class AcrossBasesEvaluator(ClipEvaluator):
    """Asks a candidate on a new base and everything else (the incumbent, the best release) on an old one, each through
    an engine of its own base. Items are the same for all, so every comparison is paired as it is within one base.
    """

    def __init__(self, old: ClipEngine, new: ClipEngine, candidate: str, *, cache: Path | None = None) -> None:
        super().__init__(new, cache=cache)
        self.old = ClipEvaluator(old, cache=cache)
        self.candidate = candidate

    def load(self, name: str, directory: Path, *, candidate: bool = False) -> None:
        """Make an adapter resident in the engine of its base. Raises AdapterError."""
        if candidate:
            super().load(name, directory, candidate=True)
        else:
            self.old.load(name, directory)

    def score(self, suite: Suite, adapter: str | None, *, label: str = "") -> Outcomes:
        """Ranks of the right answers; None is the new base alone."""
        if adapter in (None, self.candidate):
            return super().score(suite, adapter, label=label)
        alone = adapter == base_alone(self.old.base)
        return self.old.score(suite, None if alone else adapter, label=label)

    def diagnostics(self, scores: Sequence[Scores], incumbent: str | None, candidate: str) -> Diagnostics:
        """None: features of two bases cannot be compared."""
        return Diagnostics()

    def cross_version(
        self, suites: Sequence[Suite], incumbent: str | None, candidate: str, margin: float, level: float
    ) -> CrossVersion | None:
        """None: vectors of two bases cannot be compared."""
        return None
