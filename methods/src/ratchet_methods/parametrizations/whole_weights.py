"""Training of whole weights: all, those of normalisations, or biases, as a difference to the start."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ratchet_methods.parametrizations.parametrization import Parametrization, Selects


class WholeWeights(Parametrization):
    """Full fine-tuning: W' = W + D, with D of the weight's shape, initially 0. Weight decay pulls towards the start,
    not towards 0."""

    selects: ClassVar[Selects] = "all"
    whole: ClassVar[bool] = True

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.difference = nn.Parameter(torch.zeros_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.difference


class LayerNorm(WholeWeights):
    """LNFit: full fine-tuning of LayerNorm, BatchNorm and similar (De Min et al. 2023; in FoMo-in-Flux)."""

    selects: ClassVar[Selects] = "norms"


class Bias(WholeWeights):
    """BitFit: full fine-tuning of every parameter called ``bias`` (Ben Zaken et al. 2022)."""

    selects: ClassVar[Selects] = "biases"
