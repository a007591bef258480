"""Candidates beside the margin, on both sides of it.

A bad candidate loses far more than the margin, and the base nothing: between W and W + ΔW lies a candidate that loses
as much as is wanted. For each parent the scale s of W + s ΔW is looked for (the false position method) and every one
that was tried is a candidate: trained weights, shortened, and answers of that very model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from benchmarks.gate.plans import MARGIN, GatePlan

TARGETS = (0.01, -0.01, 0.0, 0.018, -0.018)
"""Losses beyond the margin that are looked for, in this order."""
TRIES = 2
"""Scales for each target."""
CLOSE = 0.004
WITHIN = 0.02
"""Further away than this a candidate is not beside the margin."""
KINDS = ("naive", "forgotten", "poisoned")
"""Bad ones that learn something true as well: what keeps them out is the loss."""


def parents_of(plans: Sequence[GatePlan], most: int) -> list[GatePlan]:
    """Plans to be scaled, kinds in turn."""
    by_kind = [[plan for plan in plans if plan.kind == kind and not plan.incumbent] for kind in KINDS]
    in_turn = [kind[place] for place in range(len(plans)) for kind in by_kind if place < len(kind)]
    return in_turn[:most]


def scaled(plan: GatePlan, scale: float) -> GatePlan:
    """A parent's plan with another scale; its name says which."""
    return replace(plan, name=f"{plan.name}x{scale:.3f}", kind=MARGIN, scale=scale)


def beside(
    parent: GatePlan, loses: Callable[[GatePlan], float], whole: float, none: float, tries: int
) -> Iterator[GatePlan]:
    """Scaled plans whose losses lie near the targets, as far as ``tries`` for each of them reach.

    Args:
        loses: the most that a plan loses beyond a margin.
        whole, none: the same of the parent, and of the base: minus the smallest margin. Where the parent does not lose
            more than the margin nothing is to be found between them.
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
