"""Candidates near the margin, on both sides of it.

A bad candidate loses far more than the margin, and the base nothing: between W and W + ΔW is a candidate with any
wanted loss. For each parent the scale s of W + s ΔW is searched for (the false position method), and each tried scale
is a candidate, with trained, shortened weights and real answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from benchmarks.gate.plans import MARGIN, GatePlan

TARGETS = (0.01, -0.01, 0.0, 0.018, -0.018)
TRIES = 2
CLOSE = 0.004
WITHIN = 0.02
"""Further away than this a candidate is not near the margin."""
KINDS = ("naive", "forgotten", "poisoned")
"""Bad ones that also learn something true: only the loss should keep them out."""


def parents_of(plans: Sequence[GatePlan], most: int) -> list[GatePlan]:
    by_kind = [[plan for plan in plans if plan.kind == kind and not plan.incumbent] for kind in KINDS]
    in_turn = [kind[place] for place in range(len(plans)) for kind in by_kind if place < len(kind)]
    return in_turn[:most]


def scaled(plan: GatePlan, scale: float) -> GatePlan:
    return replace(plan, name=f"{plan.name}x{scale:.3f}", kind=MARGIN, scale=scale)


def beside(
    parent: GatePlan, loses: Callable[[GatePlan], float], whole: float, none: float, tries: int
) -> Iterator[GatePlan]:
    """Scaled plans whose losses are near the targets, within ``tries`` for each of them.

    Args:
        loses: the most that a plan loses beyond a margin.
        whole, none: the same of the parent, and of the base: minus the smallest margin. A parent that does not lose
            more than the margin yields none.
    """
    known = {0.0: none, 1.0: whole}
    for target in TARGETS:
        for _ in range(tries):
            if min(abs(loss - target) for loss in known.values()) <= CLOSE or whole < target:
                break
            scale = round(_between(known, target), 3)
            if scale in known:
                break
            plan = scaled(parent, scale)
            known[scale] = loses(plan)
            if abs(known[scale]) <= WITHIN:
                yield plan


def _between(known: dict[float, float], target: float) -> float:
    """Where a line between the two scales around the first crossing meets the target."""
    scales = sorted(known)
    for low, high in itertools.pairwise(scales):
        if known[low] <= target < known[high]:
            return low + (high - low) * (target - known[low]) / (known[high] - known[low])
    return scales[-1]
