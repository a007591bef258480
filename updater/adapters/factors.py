"""Low-rank algebra on ΔW = B A, without ever forming ΔW.

Everything is float64 inside: a merge repeated over hundreds of updates must not lose digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """ΔW = b @ a of one layer, the LoRA scale folded in: a [r, in], b [out, r], float64."""

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        """Columns of b."""
        return self.a.shape[0]

    def dense(self) -> Tensor:
        """ΔW [out, in]."""
        return self.b @ self.a


Delta = Mapping[str, Factor]
"""Factors by module name, as PEFT spells it."""


def merge(incumbent: Delta, trained: Delta, weight: float) -> dict[str, Factor]:
    """ΔW = (1 - weight) ΔW_incumbent + weight ΔW_trained, exactly: ranks add up until :func:`compress`."""
    merged: dict[str, Factor] = {}
    for name in sorted({*incumbent, *trained}):
        parts = [(1 - weight, incumbent.get(name)), (weight, trained.get(name))]
        kept = [(share, factor) for share, factor in parts if factor is not None and share != 0]
        if kept:
            merged[name] = Factor(
                a=torch.cat([factor.a for _, factor in kept]),
                b=torch.cat([share * factor.b for share, factor in kept], dim=1),
            )
    return merged


def compress(factor: Factor, rank: int) -> Factor:
    """The best approximation of rank ``rank`` (Eckart-Young), as factors of exactly that rank.

    Through QR of both factors and an SVD of their small [r, r] core, so that the cost does not grow with the layer.
    The singular values are split evenly between both factors; a lower true rank leaves zeros.
    """
    q_out, r_out = torch.linalg.qr(factor.b)
    q_in, r_in = torch.linalg.qr(factor.a.T)
    u, s, vt = torch.linalg.svd(r_out @ r_in.T)
    keep = min(rank, len(s))
    root = s[:keep].sqrt()
    a = torch.zeros(rank, factor.a.shape[1], dtype=factor.a.dtype)
    b = torch.zeros(factor.b.shape[0], rank, dtype=factor.b.dtype)
    a[:keep] = root[:, None] * (vt[:keep] @ q_in.T)
    b[:, :keep] = (q_out @ u[:, :keep]) * root
    return Factor(a, b)
