"""EWC: what mattered to earlier updates moves less (Kirkpatrick et al. 2017; accumulated as in Schwarz et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from updater.methods.regularizers import Gradients, Parameters, Regularizer


class Ewc(Regularizer):
    """``1/2 sum F (theta - theta_start)^2``; the recipe's weight is lambda.

    Parameters are differences to the start of the update, so ``theta - theta_start`` is the parameter itself. F is the
    diagonal of the empirical Fisher matrix: squared gradients of the objectives, averaged over ``batches`` batches
    after the last step and added to ``keep`` times that of earlier updates. It is 0 in a first update. Each update's F
    is divided by its mean over all parameters (as in Schwarz et al.), so that updates count equally and lambda means
    the same for any loss and base: the curvature of the penalty along an average parameter.
    """

    fixed_coordinates: ClassVar[bool] = True

    def __init__(self, batches: int = 8, keep: float = 1.0) -> None:
        if batches < 1:
            raise TypeError("batches is below 1, so that nothing would be measured")
        self.batches = batches
        self.keep = keep
        self.fisher: dict[str, Tensor] = {}

    def __call__(self, parameters: Parameters) -> Tensor:
        first = next(iter(parameters.values()))
        terms = [(self.fisher[name] * p.square()).sum() for name, p in parameters.items() if name in self.fisher]
        return 0.5 * torch.stack([first.new_zeros(()), *terms]).sum()

    def finish(self, parameters: Parameters, gradients: Gradients) -> None:
        fisher = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for batch in range(self.batches):
            gradients(batch)
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    fisher[name] += parameter.grad.square() / self.batches
        total = torch.stack([value.sum() for value in fisher.values()]).sum()
        mean = total / sum(value.numel() for value in fisher.values())
        if mean > 0:
            fisher = {name: value / mean for name, value in fisher.items()}
        # Keep the values of parameters that do not learn in this update.
        earlier = {name: self.keep * value for name, value in self.fisher.items()}
        self.fisher = earlier | {name: earlier.get(name, 0) + value for name, value in fisher.items()}

    @property
    def passes(self) -> int:
        return self.batches

    def state(self) -> dict[str, Tensor]:
        return {f"fisher.{name}": value for name, value in self.fisher.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.fisher = {key.removeprefix("fisher."): value for key, value in tensors.items()}
