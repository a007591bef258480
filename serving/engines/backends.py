"""What runs the two towers of a CLIP: the interface, and the names that settings have for it.

A backend belongs to one base in one process. It makes towers for the base and for each adapter, and shares between them
what the library allows. :mod:`torch_backend` and :mod:`onnx_backend` implement it; :mod:`engine_choice` says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

EngineName = Literal["torch", "onnx"]
Precision = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """A library and the precision of its matrix products. Vectors are float32 in any case."""

    engine: EngineName = "torch"
    precision: Precision = "float32"

    def __str__(self) -> str:
        return f"{self.engine} {self.precision}"


FLOAT32 = EngineChoice()
"""What every base runs with, and what others are compared to."""


class Towers(Protocol):
    """The towers of a base or of an adapter on it, ready to run. Safe to call from several threads."""

    @property
    def bytes(self) -> int:
        """Memory of their own: what they do not share with the base's."""

    @property
    def model(self) -> nn.Module | None:
        """The float32 module that runs; None where something else does."""

    def images(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """``float32 [n, dim]`` of ``uint8 [n, size, size, 3]``, as the tower gives it: not of unit length."""

    def texts(self, ids: torch.Tensor) -> npt.NDArray[np.float32]:
        """``float32 [n, dim]`` of ``int64 [n, width]``, for n up to a pass's rows."""


class Backend(Protocol):
    """Makes towers. Called by one thread at a time, while others run what it made before."""

    def convert(self, name: str, weight: torch.Tensor) -> Any:
        """An effective weight (float32) in the form that :meth:`towers` takes for the parameter of this name."""

    def towers(self, changed: Mapping[str, Any]) -> Towers:
        """Towers in which these weights (from :meth:`convert`, by parameter name) replace the base's."""
