"""The sizes of the benchmark, and the methods that all others are compared with. All sizes are in the name of the
folder that its results are kept in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Final

from core.digests import digest_json

VERSION = 2
"""Raise it when the same sizes come to mean something else."""
STANDARDS = ("default", "vlm-default")
"""What every method of a family is compared with beside zero-shot, when it was run."""

BUDGETS: Final[Mapping[str, float]] = {"vit": 240.0}
"""MAF-GFLOPs of an update on other bases than the shipped one. Of a small model low rank saves a smaller share of the
memory, so a step costs more MAF; with these the default takes as many steps as on the shipped base."""


@dataclass(frozen=True)
class Protocol:
    """What every method gets alike. An update costs about half a minute on one core with these values."""

    gflops: float = 160.0
    """Memory-adjusted GFLOPs of one update, teacher passes included."""
    batch_size: int = 48
    new: int = 256
    """Pairs of an update, at most."""
    reference: int = 96
    """Pairs of the base's own domains that every update of a chain may use."""
    replay: int = 96
    """Pairs of earlier updates, at most."""
    items: int = 240
    """Items of a suite, at most."""
    max_steps: int = 10_000
    """Beyond what any method can afford: the budget decides."""

    def on(self, base: str) -> Protocol:
        """With the budget of a base, unless another one than the standard was wished for."""
        return replace(self, gflops=BUDGETS.get(base, self.gflops)) if self.gflops == Protocol.gflops else self

    @property
    def digest(self) -> str:
        """64 hex digits."""
        return digest_json([VERSION, asdict(self)])
