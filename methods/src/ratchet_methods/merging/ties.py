"""TIES: trim small changes, elect a sign per weight, average what agrees (Yadav et al. 2023)."""

from __future__ import annotations

import torch
from peft.utils.merge_utils import prune
from torch import Tensor

from core.errors import ConfigError
from updater.adapters import Dense, LowRank, WeightDelta, combine
from updater.methods.merging import Memory, RememberingRule

SIDES = ("up", "down")


class Ties(RememberingRule):
    """ΔW = weight × the mean of those task vectors that have the elected sign, weight by weight.

    A task vector is what one update learned, trimmed once, when it arrives. The merge is over those of all updates so
    far, as the paper merges all tasks at once: of each weight the sums and the numbers of its positive and of its
    negative values are remembered. Without a memory, what is served counts as one task vector, untrimmed.

    ΔW is formed, a layer at a time. What comes out has no low rank: a LoRA adapter holds its best approximation.

    Args:
        weight: the paper's λ.
        keep: share of a layer's values that trimming leaves, the largest; above 0 and below 1.
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
    """The mean of the side whose sum is larger."""
    up, down = (memory[f"{name}/{side}/sum"].double() for side in SIDES)
    counts = [memory[f"{name}/{side}/count"].clamp_min(1) for side in SIDES]
    return torch.where(up >= down, up / counts[0], -down / counts[1])


def _like(part: LowRank | Dense, value: Tensor) -> LowRank | Dense:
    return Dense(value) if isinstance(part, Dense) else LowRank.of(value)


def _dense(part: LowRank | Dense) -> Tensor:
    return part.dense() if isinstance(part, LowRank) else part.value
