"""BitFit: only biases learn (Ben Zaken et al. 2022)."""

from __future__ import annotations

from typing import ClassVar

from updater.adapters.kinds.base import Selects
from updater.adapters.kinds.full import Full


class Bias(Full):
    """As full fine-tuning, of every parameter that is called ``bias``."""

    selects: ClassVar[Selects] = "biases"


KIND = Bias
