"""What a regularizer is: a penalty on parameters, with what it remembers of earlier updates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor, nn

Parameters = Mapping[str, nn.Parameter]
Gradients = Callable[[int], None]
"""Puts the gradients of the objectives alone, at batch number n, into the parameters' ``grad``."""


class Regularizer(ABC):
    """One penalty. Keyword arguments of ``__init__`` are the recipe's ``options``; its weight is the recipe's."""

    fixed_coordinates: ClassVar[bool] = False
    """Whether it needs parameters that mean the same in the next update: differences of whole weights, not factors."""

    def begin(self, parameters: Parameters) -> None:  # noqa: B027
        """Called before the first step, with the parameters where the update starts."""

    @abstractmethod
    def __call__(self, parameters: Parameters) -> Tensor:
        """The penalty: a scalar."""

    def stepped(self, parameters: Parameters) -> None:  # noqa: B027
        """Called after each step of the optimizer; ``grad`` is still the step's."""

    def finish(self, parameters: Parameters, gradients: Gradients) -> None:  # noqa: B027
        """Called after the last step: the time to measure what mattered. Passes are charged (``passes``)."""

    @property
    def passes(self) -> int:
        """Batches that :meth:`finish` asks gradients of."""
        return 0

    def state(self) -> dict[str, Tensor]:
        """What it remembers: kept in checkpoints, and for the next update."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Take back what :meth:`state` gave, in this update or in the one before."""
