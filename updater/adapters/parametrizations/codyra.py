"""CoDyRA: low-rank terms whose importance is learned, and the unimportant ones pruned (Lu et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from updater.adapters.parametrizations.parametrization import Parametrization, matrix, normal


class Codyra(Parametrization):
    """W' = W + B diag(g) A; B = 0 and g = 1 at first.

    In the second half of an update each step ends with ``g <- sign(g) max(|g| - kappa_t, 0)``, the proximal step of an
    l1 penalty; kappa_t grows linearly to ``kappa``. What is left is merged into the weights, so that the next update
    starts with all ranks anew. How much is pruned depends on kappa times the number of steps: about kappa steps / 4.
    """

    def __init__(
        self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator, kappa: float = 5e-3
    ) -> None:
        super().__init__()
        out, inner = matrix(weight).shape
        self.kappa = kappa
        self.a = normal((rank, inner), inner**-0.5, generator, weight)
        self.b = nn.Parameter(weight.new_zeros(out, rank))
        self.g = nn.Parameter(weight.new_ones(rank, 1))

    def forward(self, weight: Tensor) -> Tensor:
        a, b = self.factors()
        return weight + (b @ a).view_as(weight)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.g * self.a, self.b

    def stepped(self, step: int, steps: int) -> None:
        half = steps // 2
        if step < half:
            return
        kappa = self.kappa * (step + 1 - half) / (steps - half)
        self.g.copy_(self.g.sign() * (self.g.abs() - kappa).clamp_min(0))


PARAMETRIZATION = Codyra
