"""Algebra of deltas: sums and compression of ΔW, for low-rank ones without ever forming ΔW. All computation is float64:
a merge repeated over hundreds of updates must not lose digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NEGLIGIBLE = 1e-6
"""Relative changes of ΔW below this are rounding: its factors came from float32."""


@dataclass(frozen=True)
class LowRank:
    """ΔW = b @ a of one layer, with the LoRA scale folded in: a [r, in], b [out, r], float64."""

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def dense(self) -> Tensor:
        return self.b @ self.a

    @classmethod
    def of(cls, matrix: Tensor) -> LowRank:
        """Factors of a full-rank ΔW [out, in], exactly; the best approximation is found when the adapter is written."""
        out, inner = matrix.shape
        eye = torch.eye(min(out, inner), dtype=matrix.dtype)
        return cls(eye, matrix) if inner <= out else cls(matrix, eye)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.a, self.b


@dataclass(frozen=True)
class Dense:
    """Difference of one whole parameter that is not low-rank: float64, in the parameter's shape."""

    value: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.value,)


WeightDelta = Mapping[str, LowRank | Dense]
"""Factors by module name in PEFT's spelling; whole differences by parameter name."""


def merge(incumbent: WeightDelta, trained: WeightDelta, weight: float) -> dict[str, LowRank | Dense]:
    """ΔW = (1 - weight) ΔW_incumbent + weight ΔW_trained, exactly: ranks add up until :func:`compress`."""
    return combine([(1 - weight, incumbent), (weight, trained)])


def combine(shares: Sequence[tuple[float, WeightDelta]]) -> dict[str, LowRank | Dense]:
    """Weighted sum of deltas, exactly; a layer missing from one has ΔW = 0 there."""
    combined: dict[str, LowRank | Dense] = {}
    for name in sorted({name for _, delta in shares for name in delta}):
        parts = [(share, delta[name]) for share, delta in shares if name in delta and share != 0]
        factors = [(share, part) for share, part in parts if isinstance(part, LowRank)]
        wholes = [share * part.value for share, part in parts if isinstance(part, Dense)]
        if wholes:
            combined[name] = Dense(torch.stack(wholes).sum(dim=0))
        elif factors:
            combined[name] = LowRank(
                a=torch.cat([factor.a for _, factor in factors]),
                b=torch.cat([share * factor.b for share, factor in factors], dim=1),
            )
    return combined


def fits(factor: LowRank, rank: int) -> bool:
    """True if :func:`compress` to ``rank`` loses nothing that float32 could hold."""
    if factor.rank <= rank:
        return True
    dense = factor.dense()
    return bool((dense - compress(factor, rank).dense()).norm() <= NEGLIGIBLE * dense.norm())


def kept_share(delta: WeightDelta, rank: int) -> float:
    """Share of the squared norm of a delta's factors that compression to ``rank`` keeps; 1 for an empty delta."""
    factors = [part for part in delta.values() if isinstance(part, LowRank)]
    whole = sum(map(_squared_norm, factors))
    kept = sum(_squared_norm(part if fits(part, rank) else compress(part, rank)) for part in factors)
    return kept / whole if whole else 1.0


def _squared_norm(factor: LowRank) -> float:
    return float(((factor.b.T @ factor.b) * (factor.a @ factor.a.T)).sum())


def compress(factor: LowRank, rank: int) -> LowRank:
    """Best approximation of rank ``rank`` (Eckart-Young), as factors of exactly that rank. Uses QR of both factors and
    an SVD of their small [r, r] core, so the cost does not grow with the layer. The singular values are split evenly
    between both factors; a lower true rank is padded with zeros."""
    q_out, r_out = torch.linalg.qr(factor.b)
    q_in, r_in = torch.linalg.qr(factor.a.T)
    u, s, vt = torch.linalg.svd(r_out @ r_in.T)
    keep = min(rank, len(s))
    root = s[:keep].sqrt()
    a = torch.zeros(rank, factor.a.shape[1], dtype=factor.a.dtype)
    b = torch.zeros(factor.b.shape[0], rank, dtype=factor.b.dtype)
    a[:keep] = root[:, None] * (vt[:keep] @ q_in.T)
    b[:, :keep] = (q_out @ u[:, :keep]) * root
    return LowRank(a, b)
