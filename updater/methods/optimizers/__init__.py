"""What moves the parameters, one file each, found by its module's name.

A new one is one file here that defines ``OPTIMIZER``: a function ``(groups, weight_decay, **options)`` that gives a
``torch.optim.Optimizer``. Its state must be tensors by parameter, so that a checkpoint can hold it without pickle.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from updater.recipes import Optimizer
from updater.recipes.plugin_registry import find, method_names, options_of

__all__ = ["make", "names", "state_bytes"]


def names() -> list[str]:
    """Names that a recipe's ``optimizer.kind`` may have."""
    return method_names(__name__)


def make(optimizer: Optimizer, groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer of a recipe. Raises ConfigError for an unknown kind or option."""
    factory = find(__name__, "OPTIMIZER", "optimizer", optimizer.kind, names())
    with options_of("optimizer", optimizer.kind):
        return factory(groups, weight_decay, **optimizer.options)  # type: ignore[no-any-return]


def state_bytes(optimizer: torch.optim.Optimizer, parameter: Tensor) -> int:
    """Bytes of an optimizer's state for a parameter: its own ``state_bytes`` if it has one, else Adam's two moments."""
    own = getattr(optimizer, "state_bytes", None)
    return int(own(parameter)) if own else 2 * parameter.numel() * parameter.element_size()
