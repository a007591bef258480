"""What moves the parameters: AdamW, or an optimizer that is installed.

One is a function ``(groups, weight_decay, **options)`` that gives a ``torch.optim.Optimizer``. Its state must be
tensors by parameter, so that a checkpoint can hold it without pickle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from updater.recipes import Optimizer
from updater.recipes.plugin_registry import Methods


def adamw(
    groups: list[dict[str, Any]], weight_decay: float, beta1: float = 0.9, beta2: float = 0.98
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) with CLIP's betas."""
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=weight_decay, betas=(beta1, beta2), foreach=False)


OPTIMIZERS: Final[Methods[Callable[..., torch.optim.Optimizer]]] = Methods("optimizers", "optimizer", {"adamw": adamw})


def make(optimizer: Optimizer, groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer of a recipe. Raises ConfigError for an unknown kind or option."""
    factory = OPTIMIZERS.find(optimizer.kind)
    with OPTIMIZERS.options_of(optimizer.kind):
        return factory(groups, weight_decay, **optimizer.options)


def state_bytes(optimizer: torch.optim.Optimizer, parameter: Tensor) -> int:
    """Bytes of an optimizer's state for a parameter: its own ``state_bytes`` if it has one, else Adam's two moments."""
    own = getattr(optimizer, "state_bytes", None)
    return int(own(parameter)) if own else 2 * parameter.numel() * parameter.element_size()
