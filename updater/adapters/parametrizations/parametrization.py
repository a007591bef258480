"""What learns in one weight: a parametrization W -> W'(theta) that is the identity before the first step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

Selects = Literal["layers", "norms", "biases", "all"]
"""The weights that are parametrized: of layers that take LoRA, of normalisations, biases, or every parameter."""


class Parametrization(nn.Module, ABC):
    """One weight's parametrization, registered with ``torch.nn.utils.parametrize``.

    ``__init__`` takes the weight as the update finds it, the recipe's rank and alpha, a seeded generator, and the
    recipe's ``adapter.options`` as keyword arguments. Its ``nn.Parameter`` are what learns.
    """

    selects: ClassVar[Selects] = "layers"
    in_place: ClassVar[bool] = False
    """Whether W' could stand where W does, with nothing besides: what full fine-tuning needs is counted that way."""

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight, in the weight's shape."""

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(a [r, in], b [out, r]) with W' - W = b @ a for the weight as [out, in]; None where that has no low rank."""
        return None

    def stepped(self, step: int, steps: int) -> None:
        """Called after each step of the optimizer."""

    def state(self) -> dict[str, Tensor]:
        """What else a resumed update needs, beside parameters."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave."""


def matrix(weight: Tensor) -> Tensor:
    """A weight as [out, in]; a convolution's kernel counts as input."""
    return weight.flatten(1)


def normal(shape: tuple[int, ...], std: float, generator: torch.Generator, like: Tensor) -> nn.Parameter:
    """A parameter drawn from N(0, std)."""
    return nn.Parameter((torch.randn(shape, generator=generator) * std).to(like.device, like.dtype))
