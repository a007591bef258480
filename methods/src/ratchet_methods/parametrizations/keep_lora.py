"""KeepLoRA: LoRA in the directions of the gradient that the weights do not use already."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ratchet_methods.parametrizations.parametrization import Parametrization, matrix, normal


class KeepLora(Parametrization):
    """W' = W + B A with A fixed: the directions in which the first step's gradient of W is largest outside of W's
    principal ones (KeepLoRA, Luo et al. 2026); only B learns, from 0.

    The first step finds these directions, without the gradient of W itself: with a random B and A = 0, the gradient of
    A is B^T G, whose rows span the leading directions of G (randomized range finder, Halko et al. 2011). W is the
    weight at the start of the update, with what earlier updates learned, which stands for the paper's directions of
    earlier tasks' features.

    ``energy``: share of W's squared singular values in the principal directions.
    """

    principal: Tensor

    def __init__(
        self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator, energy: float = 0.9
    ) -> None:
        super().__init__()
        if not 0 < energy < 1:
            raise TypeError(f"energy is {energy}, and must be between 0 and 1")
        out, inner = matrix(weight).shape
        _, values, vt = torch.linalg.svd(matrix(weight).double(), full_matrices=False)
        shares = values.square().cumsum(0) / values.square().sum().clamp_min(1e-30)
        leading = int((shares < energy).sum()) + 1
        self.register_buffer("principal", vt[:leading].to(weight.dtype))
        self.a = nn.Parameter(weight.new_zeros(min(rank, inner), inner))
        self.b = normal((out, min(rank, inner)), out**-0.5, generator, weight)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.a, self.b

    @torch.no_grad()
    def stepped(self, step: int, steps: int) -> None:
        if self.a.grad is None:
            return
        outside = self.a.grad - self.a.grad @ self.principal.T @ self.principal
        directions, size = torch.linalg.qr(outside.double().T)
        rest = size.diagonal().abs() > 1e-12 * size.abs().max().clamp_min(1e-300)
        self.a.copy_((directions * rest).T.to(self.a.dtype))
        self.b.zero_()
        self._fix()

    def _fix(self) -> None:
        self.a.requires_grad_(False)
        self.a.grad = None

    def state(self) -> dict[str, Tensor]:
        return {} if self.a.requires_grad else {"fixed": torch.ones(1)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self._fix()
