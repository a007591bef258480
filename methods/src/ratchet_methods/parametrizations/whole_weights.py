"""Whole weights learn: all of them, those of normalisations, or biases. The difference to the start is what learns."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ratchet_methods.parametrizations.parametrization import Parametrization, Selects


class WholeWeights(Parametrization):
    """Full fine-tuning: W' = W + D, D of the weight's shape, 0 at first. Weight decay then pulls towards the start, not
    towards 0.
    """

    selects: ClassVar[Selects] = "all"
    whole: ClassVar[bool] = True

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.difference = nn.Parameter(torch.zeros_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.difference


class LayerNorm(WholeWeights):
    """LNFit: as full fine-tuning, of LayerNorm, BatchNorm and their like (De Min et al. 2023; in FoMo-in-Flux)."""

    selects: ClassVar[Selects] = "norms"


class Bias(WholeWeights):
    """BitFit: as full fine-tuning, of every parameter that is called ``bias`` (Ben Zaken et al. 2022)."""

    selects: ClassVar[Selects] = "biases"
