"""The sizes of the benchmark, and the methods that all others are compared with. All sizes are in the name of the
results' folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Final

from core.digests import digest_json

VERSION = 3
"""Raise it when the meaning of the same sizes changes."""
STANDARDS = ("default", "vlm-default")
"""The methods that all others of a family are compared with, in addition to zero-shot, if they were run."""

LARGER = (4.0, 16.0)
"""Budgets of an update, as multiples, at which the best methods run as well."""
BUDGETS: Final[Mapping[str, float]] = {"vit": 240.0}
"""MAF-GFLOPs of an update on bases other than the shipped one. Low rank saves a smaller share of a small model's
memory, so a step costs more MAF; with these the default takes as many steps as on the shipped base."""


@dataclass(frozen=True)
class Protocol:
    """The conditions of every method. An update costs about half a minute on one core with these values."""

    gflops: float = 160.0
    """Memory-adjusted GFLOPs of one update, teacher passes included."""
    batch_size: int = 48
    new: int = 256
    reference: int = 96
    """Pairs of the base's own domains that every update of a chain may use."""
    replay: int = 96
    items: int = 240
    swapped: float = 0.0
    """Share of an update's pairs that have another one's caption."""
    hostile: float = 0.0
    """Share of an update's pairs that are of a source which writes the same caption under all its pictures."""
    max_steps: int = 10_000
    """More than any method can afford: the budget decides."""

    def on(self, base: str, budget: float = 1.0) -> Protocol:
        """With the MAF of an update on this base, times ``budget``."""
        own = BUDGETS.get(base, self.gflops) if self.gflops == Protocol.gflops else self.gflops
        return replace(self, gflops=budget * own)

    @property
    def digest(self) -> str:
        """64 hex digits."""
        return digest_json([VERSION, asdict(self)])
