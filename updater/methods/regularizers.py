"""Regularizers: terms of the loss over parameters, with their state from earlier updates. Packages can add more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Final

import torch
from torch import Tensor, nn

from core.errors import ConfigError
from updater.adapters.kinds import KINDS
from updater.recipes import Recipe, Term
from updater.recipes.plugin_registry import Methods

Parameters = Mapping[str, nn.Parameter]
Gradients = Callable[[int], None]
"""Computes the gradients of the objectives alone, at batch number n, into the parameters' ``grad``."""


class Regularizer(ABC):
    """One penalty. Keyword arguments of ``__init__`` are the recipe's ``options``; its weight is the recipe's."""

    fixed_coordinates: ClassVar[bool] = False
    """True if it needs parameters that mean the same in the next update: differences of whole weights, not factors."""

    def begin(self, parameters: Parameters) -> None:  # noqa: B027
        """Called before the first step, with the parameters at their start."""

    @abstractmethod
    def __call__(self, parameters: Parameters) -> Tensor:
        """Return the penalty: a scalar."""

    def stepped(self, parameters: Parameters) -> None:  # noqa: B027
        """Called after each step of the optimizer; ``grad`` is still the step's."""

    def finish(self, parameters: Parameters, gradients: Gradients) -> None:  # noqa: B027
        """Called after the last step, to measure what mattered. Its passes are charged (``passes``)."""

    @property
    def passes(self) -> int:
        """Batches whose gradients :meth:`finish` requests."""
        return 0

    def state(self) -> dict[str, Tensor]:
        """State for checkpoints and for the next update."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Restore what :meth:`state` returned, in this update or in the one before."""


class L2(Regularizer):
    """Sum over parameters of ``(theta - theta_start)^2`` (L2-SP, Li et al. 2018; ZSCL's weight consolidation)."""

    def begin(self, parameters: Parameters) -> None:
        self.start = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def __call__(self, parameters: Parameters) -> Tensor:
        return torch.stack([(p - self.start[name]).square().sum() for name, p in parameters.items()]).sum()


REGULARIZERS: Final[Methods[type[Regularizer]]] = Methods("regularizers", "regularizer", {"l2": L2}, Regularizer)


def build(recipe: Recipe) -> Sequence[tuple[Term, Regularizer]]:
    """Create a recipe's regularizers. Raises ConfigError for an unknown name or option, or one without meaning here."""
    built = []
    for term in recipe.regularizers:
        kind = REGULARIZERS.find(term.name)
        if kind.fixed_coordinates and not KINDS.find(recipe.adapter.kind).whole:
            raise ConfigError(
                f"regularizer {term.name!r} compares weights between updates, and the factors of "
                f"{recipe.adapter.kind!r} are not the same ones in the next update.",
                "Use it with an adapter.kind whose parameters are differences of whole weights, such as full.",
            )
        with REGULARIZERS.options_of(term.name):
            built.append((term, kind(**term.options)))
    return built
