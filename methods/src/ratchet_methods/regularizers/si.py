"""Synaptic intelligence: like EWC, with importance measured along the path of training (Zenke et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from updater.methods.regularizers import Gradients, Parameters, Regularizer

TINY = 1e-30
"""Lower bound of the divisor, for a tensor that did not move at all."""


class Si(Regularizer):
    """``sum Omega (theta - theta_start)^2``; the recipe's weight is c.

    Each step adds ``-gradient * movement`` to omega, the parameter's contribution to the loss; the gradient is that of
    the step, including the penalty and the bound on its norm. After the last step ``Omega <- Omega + max(omega, 0) /
    (change^2 + d)`` with damping d. Batch noise can make omega negative, and a negative Omega would push parameters
    away. As with EWC, ``theta - theta_start`` is the parameter itself.

    ``xi``: the damping is xi times the mean square change of the parameters of one tensor. In the paper xi is the
    damping itself, 0.1; squared changes in fine-tuning are a millionth of that, and nothing would be held.
    """

    fixed_coordinates: ClassVar[bool] = True

    def __init__(self, xi: float = 1.0) -> None:
        if xi <= 0:
            raise TypeError("xi is not above 0, and divides where a parameter did not move")
        self.xi = xi
        self.total: dict[str, Tensor] = {}
        self.path: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    def __call__(self, parameters: Parameters) -> Tensor:
        self._before = {name: p.detach().clone() for name, p in parameters.items()}
        first = next(iter(parameters.values()))
        terms = [(self.total[name] * p.square()).sum() for name, p in parameters.items() if name in self.total]
        return torch.stack([first.new_zeros(()), *terms]).sum()

    def stepped(self, parameters: Parameters) -> None:
        for name, before in self._before.items():
            parameter = parameters[name]
            if parameter.grad is not None:
                gain = -parameter.grad * (parameter.detach() - before)
                self.path[name] = self.path[name] + gain if name in self.path else gain

    def finish(self, parameters: Parameters, gradients: Gradients) -> None:
        for name, path in self.path.items():
            square = parameters[name].detach().square()
            gain = path.clamp_min(0) / (square + self.xi * square.mean()).clamp_min(TINY)
            self.total[name] = self.total[name] + gain if name in self.total else gain
        self.path = {}

    def state(self) -> dict[str, Tensor]:
        return {f"total.{name}": value for name, value in self.total.items()} | {
            f"path.{name}": value for name, value in self.path.items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.total, self.path = (
            {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            for prefix in ("total.", "path.")
        )
