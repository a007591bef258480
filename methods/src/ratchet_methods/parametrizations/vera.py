"""VeRA: two learned vectors per weight, around random matrices shared by weights of a shape (Kopiczko et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ratchet_methods.parametrizations.parametrization import Parametrization, matrix, normal


class Vera(Parametrization):
    """W' = W + diag(b) B diag(d) A with A, B frozen; initially b = 0 and d = ``start`` (the paper's d_init). A and B
    depend on ``seed`` and the shape, not on the update's seed: every update's ΔW has its rows in the span of the same
    A, so the sum over any number of updates has the rank of a single one."""

    def __init__(
        self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator, start: float = 0.1, seed: int = 0
    ) -> None:
        super().__init__()
        out, inner = matrix(weight).shape
        shared = torch.Generator().manual_seed(seed)
        self.a = normal((rank, inner), inner**-0.5, shared, weight).requires_grad_(False)
        self.b = normal((out, rank), rank**-0.5, shared, weight).requires_grad_(False)
        self.inner = nn.Parameter(weight.new_full((rank, 1), start))
        self.outer = nn.Parameter(weight.new_zeros(out, 1))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.inner * self.a, self.outer * self.b
