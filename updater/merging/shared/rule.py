"""Merge rules that remember the updates before; others are functions of deltas."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from updater.adapters import WeightDelta

Memory = Mapping[str, Tensor]
"""What a rule keeps of the updates so far, in their carry-over; empty before the first one."""


class RememberingRule(ABC):
    """A rule that looks at all updates so far. Keyword arguments of ``__init__`` are the recipe's ``merge.options``."""

    @abstractmethod
    def remember(
        self, served: WeightDelta, trained: WeightDelta, start: WeightDelta, memory: Memory
    ) -> dict[str, Tensor]:
        """The memory with this update, from the one without it."""

    @abstractmethod
    def __call__(self, served: WeightDelta, trained: WeightDelta, weight: float, memory: Memory) -> WeightDelta:
        """What is served next. ``memory``: with this update."""
