"""How an upgrade to another CLIP base is gated: each model is asked through an engine of its own base.

The candidate and the base reference are of the new base, the incumbent and the best release so far of the old one.
Items are the same for all, so every comparison is paired as it is within one base.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from updater.gate.clip import ClipEvaluator
from updater.gate.decision import Scores
from updater.gate.diagnostics.results import Diagnostics
from updater.gate.score import Outcomes
from updater.gate.suites import Suite
from updater.gate.verdict import CrossVersion


def base_alone(base: ClipBase) -> str:
    """Name of the incumbent where nothing was released: the old base without an adapter."""
    return f"the base {base.name}"


class AcrossBasesEvaluator(ClipEvaluator):
    """Asks a candidate on a new base and everything else on an old one. See :class:`ClipEvaluator`."""

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
