"""Models whose weights are about to be loaded, made without drawing random ones first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

FILLED: Final = (
    "normal_",
    "uniform_",
    "trunc_normal_",
    "xavier_normal_",
    "xavier_uniform_",
    "kaiming_normal_",
    "kaiming_uniform_",
)
DRAWS: Final = {getattr(init, name) for name in FILLED} | {Tensor.normal_, Tensor.uniform_}
"""What fills weights, and returns them."""
RANDOM: Final[dict[Callable[..., Any], Callable[..., Any]]] = {torch.randn: torch.empty, torch.rand: torch.empty}


class Undrawn(TorchFunctionMode):
    """In its block, and in its thread, weights that would be random are whatever was in memory.

    To draw those of a ViT-B-32 takes a processor a second and more.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        """See :class:`torch.overrides.TorchFunctionMode`."""
        if func in DRAWS:
            return args[0] if args else (kwargs or {})["tensor"]
        return RANDOM.get(func, func)(*args, **(kwargs or {}))
