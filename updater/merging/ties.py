"""TIES: trim small changes, elect a sign per weight, average what agrees with it (Yadav et al. 2023)."""

from __future__ import annotations

import torch
from peft.utils.merge_utils import ties as elect
from torch import Tensor

from ops.errors import ConfigError
from updater.adapters import Dense, LowRank, WeightDelta


def ties(
    served: WeightDelta, trained: WeightDelta, start: WeightDelta, weight: float, keep: float = 0.2
) -> WeightDelta:
    """ΔW = weight × the mean of those of ΔW_served and ΔW_trained that have the elected sign, weight by weight.

    ΔW is formed, a layer at a time. What comes out has no low rank: a LoRA adapter holds its best approximation.

    Args:
        weight: the paper's λ.
        keep: share of a layer's values that trimming leaves, the largest; above 0 and below 1.
    """
    if not 0 < keep < 1:
        raise ConfigError(f"merge.options.keep is {keep}, not between 0 and 1.", "Use 0.2, as the paper does.")
    return {name: _elected(served.get(name), trained.get(name), weight, keep) for name in sorted({*served, *trained})}


def _elected(old: LowRank | Dense | None, new: LowRank | Dense | None, weight: float, keep: float) -> LowRank | Dense:
    tensors = [_dense(part) for part in (old, new) if part is not None]
    shares = torch.full((len(tensors),), weight, dtype=tensors[0].dtype)
    value = elect(tensors, shares, density=keep)
    return Dense(value) if isinstance(old or new, Dense) else LowRank.of(value)


def _dense(part: LowRank | Dense) -> Tensor:
    return part.dense() if isinstance(part, LowRank) else part.value


RULE = ties
