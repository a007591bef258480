"""Linear interpolation in ΔW space: EMA merge, WiSE-FT and PAINT, depending on what each update starts from."""

from __future__ import annotations

from updater.adapters import Delta, merge


def linear(served: Delta, trained: Delta, weight: float) -> Delta:
    """ΔW = (1 - weight) ΔW_served + weight ΔW_trained, exactly."""
    return merge(served, trained, weight)


RULE = linear
