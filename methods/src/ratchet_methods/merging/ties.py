"""TIES merging: trim small changes, elect a sign per weight, average the values that agree (Yadav et al. 2023)."""

from __future__ import annotations

import torch
from peft.utils.merge_utils import prune
from torch import Tensor

from core.errors import ConfigError
from updater.adapters import Dense, LowRank, WeightDelta, combine
from updater.methods.merging import Memory, RememberingRule

SIDES = ("up", "down")


class Ties(RememberingRule):
    """ΔW = weight × the mean, per weight, of the task vectors that have the elected sign.

    A task vector is what one update learned, trimmed when it arrives. As in the paper all tasks are merged at once: the
    memory holds, per weight, the sums and counts of positive and of negative values over all updates. Without a memory,
    the served ΔW counts as one untrimmed task vector.

    ΔW is formed one layer at a time. The result is not low-rank; a LoRA adapter holds its best approximation.

    Args:
        weight: the paper's λ.
        keep: share of a layer's values (the largest) that trimming keeps, between 0 and 1.
    """

    def __init__(self, keep: float = 0.2) -> None:
        if not 0 < keep < 1:
            raise ConfigError(f"merge.options.keep is {keep}, not between 0 and 1.", "Use 0.2, as the paper does.")
        self.keep = keep

    def __call__(self, served: WeightDelta, trained: WeightDelta, weight: float, memory: Memory) -> WeightDelta:
        return {
            name: _like(part, weight * _elected(memory, name)) for name, part in sorted({**served, **trained}.items())
        }

    def remember(
        self, served: WeightDelta, trained: WeightDelta, start: WeightDelta, memory: Memory
    ) -> dict[str, Tensor]:
        learned = combine([(1.0, trained), (-1.0, start)])
        after = dict(memory)
        for name in sorted({*served, *learned}):
            vectors = [prune(_dense(learned[name]), self.keep, "magnitude")] if name in learned else []
            if name in served and f"{name}/up/sum" not in memory:
                vectors.append(_dense(served[name]))
            for side, sign in zip(SIDES, (1, -1), strict=True):
                keys = f"{name}/{side}/sum", f"{name}/{side}/count"
                total, count = (memory.get(key) for key in keys)
                for vector in vectors:
                    own = (vector * sign).clamp_min(0)
                    total = own if total is None else total + own
                    some = (own > 0).to(torch.int16)
                    count = some if count is None else count + some
                assert total is not None and count is not None
                after |= dict(zip(keys, (total.float(), count), strict=True))
        return after


def _elected(memory: Memory, name: str) -> Tensor:
    up, down = (memory[f"{name}/{side}/sum"].double() for side in SIDES)
    counts = [memory[f"{name}/{side}/count"].clamp_min(1) for side in SIDES]
    return torch.where(up >= down, up / counts[0], -down / counts[1])


def _like(part: LowRank | Dense, value: Tensor) -> LowRank | Dense:
    return Dense(value) if isinstance(part, Dense) else LowRank.of(value)


def _dense(part: LowRank | Dense) -> Tensor:
    return part.dense() if isinstance(part, LowRank) else part.value
