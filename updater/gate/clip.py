"""Gates a CLIP through `ClipEngine`, by classification and retrieval; within one base, or across two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from core.artifacts import Artifacts
from core.errors import GateError
from core.ledger import Ledger
from core.recorded_adapters import fetch_recorded
from core.settings import Settings
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase, load_base
from updater.adapters import trainer_encoder
from updater.gate import checks as c
from updater.gate import cross_version
from updater.gate.calibration import calibrate
from updater.gate.crossings import CrossVersion
from updater.gate.decision import Scores
from updater.gate.diagnostics import feature_shift, pair_accuracy
from updater.gate.score import Outcomes, Scorer, worst_items
from updater.gate.suites import PROBE, Family, Suite, probe
from updater.gate.verdict import Check, Diagnostics, Regression

LATENCY_BATCH = 8


def live_clip(settings: Settings) -> tuple[Scorer, str | None]:
    """The live CLIP adapter's scorer and name; None: the base alone is live. Raises BaseModelError, AdapterError."""
    base = load_base(settings.home, settings.base.clip)
    scorer = Scorer(ClipEngine.of(settings, base, threads=settings.updater.threads))
    with closing(Ledger.open(settings.ledger)) as ledger:
        adapter = live.clip if (live := ledger.stable()) else None
        if adapter:
            scorer.engine.load(adapter, fetch_recorded(Artifacts(settings.artifacts), ledger, adapter))
    return scorer, adapter


class ClipEvaluator(Scorer):
    family: Family = "clip"

    def __init__(self, engine: ClipEngine, *, parity: c.Encode | None = None, cache: Path | None = None) -> None:
        """`parity`: the trainer's model, to compare with the engine; `cache`: folder of scores, by default the suite's
        own, `home/cache/gate`."""
        super().__init__(engine, cache)
        self.parity = parity

    @property
    def base(self) -> ClipBase:
        return self.engine.base

    def load(self, name: str, directory: Path, *, candidate: bool = False) -> None:
        """Raises AdapterError."""
        self.engine.load(name, directory)
        if candidate:
            self.parity = trainer_encoder(self.base, directory)

    def diagnostics(self, scores: Sequence[Scores], incumbent: str | None, candidate: str) -> Diagnostics:
        suites = [each.suite for each in scores]
        retrieval = [suite for suite in suites if suite.task == "retrieval"]
        pairs = {suite.name: pair_accuracy(self, suite, incumbent, candidate) for suite in retrieval}
        return Diagnostics(
            pairs={name: each for name, each in pairs.items() if each is not None},
            shift=feature_shift(self, suites, incumbent, candidate),
            calibration=calibrate(self, suites, candidate),
        )

    def regressions(self, suite: Suite, before: Outcomes, after: Outcomes) -> tuple[Regression, ...]:
        return worst_items(self, suite, before, after)

    def answer_checks(self, candidate: str, suites: Sequence[Suite]) -> list[Check]:
        """Always empty: :meth:`checks` sees the vectors before any suite is scored."""
        return []

    def cross_version(
        self, suites: Sequence[Suite], incumbent: str | None, candidate: str, margin: float, level: float
    ) -> CrossVersion | None:
        return cross_version.measure(self, suites, incumbent, candidate, margin, level)

    def checks(self, candidate: str, suites: Sequence[Suite], facts: Mapping[str, Any]) -> list[Check]:
        engine = self.engine
        checks = [c.check_loads(candidate in engine.resident, candidate, facts)]
        few = list({item.id: item for _, items in probe(suites) for item in items}.values())[:PROBE]
        if not checks[0].ok or len(few) < 2:
            return checks
        texts = sorted({item.text for item in few})
        pixels = np.stack([self.pixels(item) for item in few])
        base_images, base_texts = self.images(few, None), self.texts(texts, None)
        try:
            images, words = self.images(few, candidate), self.texts(texts, candidate)
            checks.append(c.check_finite(images, words))
            if not checks[-1].ok:
                return checks
            checks.append(c.check_collapse("image", base_images, images))
            if len(texts) > 2:
                checks.append(c.check_collapse("text", base_texts, words))
            checks.append(c.check_drift(engine.model(None).state_dict(), engine.model(candidate).state_dict()))
            if self.parity is not None:
                checks.append(c.check_parity(self.parity, pixels[:16], texts[:16], (images[:16], words[:16])))
            short = [text[:100] for text in texts[:LATENCY_BATCH]]
            checks.append(self.latency(candidate, pixels[:LATENCY_BATCH], short))
            checks.append(c.check_size(facts.get("rank"), facts.get("bytes")))
        except GateError:
            raise
        except Exception as error:  # a candidate that breaks the engine is rejected, with a report
            checks.append(Check("finite", False, f"the candidate failed on the probe: {error!r}"[:300]))
        return checks

    def latency(self, candidate: str, pixels: NDArray[np.uint8], texts: list[str]) -> Check:
        """Time a batch on one thread: several would wait for each other, which measures the machine, not the model."""

        def ask(adapter: str | None) -> None:
            self.engine.encode_images(pixels, adapter)
            self.engine.encode_texts(texts, adapter)

        what = f"{len(pixels)} images and {len(texts)} texts take"
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return c.check_latency(ask, candidate, what, ratio=c.LATENCY_RATIO, grace=c.GRACE_SECONDS, rounds=5)
        finally:
            torch.set_num_threads(threads)


def base_alone(base: ClipBase) -> str:
    return f"the base {base.name}"


class AcrossBasesEvaluator(ClipEvaluator):
    """Evaluates a candidate on a new base and everything else (incumbent, best release) on an old one, each in an
    engine of its base. Items are the same for all, so comparisons are paired as within one base."""

    def __init__(self, old: ClipEngine, new: ClipEngine, candidate: str) -> None:
        super().__init__(new)
        self.old = ClipEvaluator(old)
        self.candidate = candidate

    def load(self, name: str, directory: Path, *, candidate: bool = False) -> None:
        if candidate:
            super().load(name, directory, candidate=True)
        else:
            self.old.load(name, directory)

    def score(self, suite: Suite, adapter: str | None, *, label: str = "") -> Outcomes:
        if adapter in (None, self.candidate):
            return super().score(suite, adapter, label=label)
        alone = adapter == base_alone(self.old.base)
        return self.old.score(suite, None if alone else adapter, label=label)

    def diagnostics(self, scores: Sequence[Scores], incumbent: str | None, candidate: str) -> Diagnostics:
        """The calibration alone: features of two bases cannot be compared."""
        return Diagnostics(calibration=calibrate(self, [each.suite for each in scores], candidate))

    def cross_version(
        self, suites: Sequence[Suite], incumbent: str | None, candidate: str, margin: float, level: float
    ) -> CrossVersion | None:
        """Always None: vectors of two bases cannot be compared."""
        return None
