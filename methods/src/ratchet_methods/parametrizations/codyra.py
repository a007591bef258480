"""CoDyRA: low-rank terms with learned importance, the unimportant ones pruned (Lu et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ratchet_methods.parametrizations.parametrization import Parametrization, matrix, normal


class Codyra(Parametrization):
    """W' = W + B diag(g) A; initially B = 0 and g ~ N(0, 1).

    In the second half of an update each step ends with ``g <- sign(g) max(|g| - t, 0)``, the proximal step of an l1
    penalty, with a threshold t that grows linearly. The rest is merged into the weights, so the next update starts with
    all ranks again.

    ``shrinkage``: sum of all thresholds of an update, whatever its number of steps; the default is that of the
    published code (250 steps, t up to 0.005). Gates that do not move are pruned if they began below it: 47% of them.
    """

    def __init__(
        self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator, shrinkage: float = 0.625
    ) -> None:
        super().__init__()
        out, inner = matrix(weight).shape
        self.shrinkage = shrinkage
        self.a = normal((rank, inner), inner**-0.5, generator, weight)
        self.b = nn.Parameter(weight.new_zeros(out, rank))
        self.g = normal((rank, 1), 1.0, generator, weight)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.g * self.a, self.b

    def stepped(self, step: int, steps: int) -> None:
        half = steps // 2
        if step < half:
            return
        count = steps - half
        threshold = self.shrinkage * 2 * (step + 1 - half) / (count * (count + 1))
        self.g.copy_(self.g.sign() * (self.g.abs() - threshold).clamp_min(0))
