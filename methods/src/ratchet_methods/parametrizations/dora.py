"""DoRA: separate learning of a weight's magnitude and direction (Liu et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ratchet_methods.parametrizations.parametrization import Parametrization, matrix, normal


class Dora(Parametrization):
    """W' = m (W + s B A) / ||W + s B A||, with the norm and m per output row; s = alpha / rank, initially B = 0. The
    norm is a constant to the gradient, as in the paper (section 4.3), which saves memory at no cost in accuracy."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        out, inner = matrix(weight).shape
        self.scale = alpha / rank
        self.a = normal((rank, inner), inner**-0.5, generator, weight)
        self.b = nn.Parameter(weight.new_zeros(out, rank))
        self.magnitude = nn.Parameter(_norms(matrix(weight)))

    def forward(self, weight: Tensor) -> Tensor:
        direction = matrix(weight) + self.scale * (self.b @ self.a)
        # One factor per row instead of two operations on the matrix; exactly 1 before the first step.
        return (direction * (self.magnitude / _norms(direction.detach()))).view_as(weight)


def _norms(rows: Tensor) -> Tensor:
    return rows.square().sum(dim=1, keepdim=True).sqrt().clamp_min(1e-12)
