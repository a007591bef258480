"""Spherical interpolation of task vectors, layer by layer (WARP, Ramé et al. 2024), without forming ΔW."""

from __future__ import annotations

import math

from updater.adapters import Dense, LowRank, WeightDelta, combine

PARALLEL = 1e-6
"""Sine of the angle below which the formula divides zero by zero; linear interpolation, its limit, is used there."""


def slerp(served: WeightDelta, trained: WeightDelta, start: WeightDelta, weight: float) -> WeightDelta:
    """ΔW = sin((1 - w) Ω) / sin Ω ΔW_served + sin(w Ω) / sin Ω ΔW_trained, Ω being the angle between both. Keeps the
    length of ΔW where linear interpolation of dissimilar updates would shrink it. A layer that only one of them changes
    is interpolated linearly."""
    merged: dict[str, LowRank | Dense] = {}
    for name in sorted({*served, *trained}):
        old, new = served.get(name), trained.get(name)
        shares = (1 - weight, weight) if old is None or new is None else _shares(old, new, weight)
        merged |= combine([(share, {name: part}) for share, part in zip(shares, (old, new), strict=True) if part])
    return merged


def _shares(old: LowRank | Dense, new: LowRank | Dense, weight: float) -> tuple[float, float]:
    lengths = math.sqrt(_inner(old, old) * _inner(new, new))
    cosine = _inner(old, new) / lengths if lengths else 1.0
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sin(angle) < PARALLEL:
        return 1 - weight, weight
    return math.sin((1 - weight) * angle) / math.sin(angle), math.sin(weight * angle) / math.sin(angle)


def _inner(one: LowRank | Dense, other: LowRank | Dense) -> float:
    """<ΔW_1, ΔW_2>; for factors the sum over (b1ᵀ b2) * (a1 a2ᵀ)."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return float(((one.b.T @ other.b) * (one.a @ other.a.T)).sum())
    assert isinstance(one, Dense) and isinstance(other, Dense)
    return float((one.value * other.value).sum())
