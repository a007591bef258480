"""Full fine-tuning: every parameter of the towers that are not locked. The difference to the start is what learns."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from updater.adapters.parametrizations.parametrization import Parametrization, Selects


class Full(Parametrization):
    """W' = W + D, D of the weight's shape, 0 at first. Weight decay then pulls towards the start, not towards 0."""

    selects: ClassVar[Selects] = "all"
    in_place: ClassVar[bool] = True

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.difference = nn.Parameter(torch.zeros_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.difference


PARAMETRIZATION = Full
