"""LNFit: only the scales and shifts of normalisations learn (De Min et al. 2023; in FoMo-in-Flux)."""

from __future__ import annotations

from typing import ClassVar

from updater.adapters.parametrizations.full import Full
from updater.adapters.parametrizations.parametrization import Selects


class LayerNorm(Full):
    """As full fine-tuning, of LayerNorm, BatchNorm and their like."""

    selects: ClassVar[Selects] = "norms"


PARAMETRIZATION = LayerNorm
