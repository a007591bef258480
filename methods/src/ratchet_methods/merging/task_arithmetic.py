"""Task arithmetic: add what an update learned to what is served (Ilharco et al. 2023)."""

from __future__ import annotations

from updater.adapters import WeightDelta, combine


def task_arithmetic(served: WeightDelta, trained: WeightDelta, start: WeightDelta, weight: float) -> WeightDelta:
    """ΔW = ΔW_served + weight (ΔW_trained - ΔW_start), exactly. With ``start: base`` this is the weighted sum of all
    task vectors so far: earlier updates do not decay."""
    return combine([(1.0, served), (weight, trained), (-weight, start)])
