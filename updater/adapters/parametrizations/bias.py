"""BitFit: only biases learn (Ben Zaken et al. 2022)."""

from __future__ import annotations

from typing import ClassVar

from updater.adapters.parametrizations.full import Full
from updater.adapters.parametrizations.parametrization import Selects


class Bias(Full):
    """As full fine-tuning, of every parameter that is called ``bias``."""

    selects: ClassVar[Selects] = "biases"


PARAMETRIZATION = Bias
