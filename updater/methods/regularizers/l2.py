"""L2-SP: the parameters stay near where the update started (Li et al. 2018; ZSCL's weight consolidation)."""

from __future__ import annotations

import torch
from torch import Tensor

from updater.methods.regularizers.regularizer import Parameters, Regularizer


class L2(Regularizer):
    """Sum over parameters of ``(theta - theta_start)^2``."""

    def begin(self, parameters: Parameters) -> None:
        self.start = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def __call__(self, parameters: Parameters) -> Tensor:
        return torch.stack([(p - self.start[name]).square().sum() for name, p in parameters.items()]).sum()


REGULARIZER = L2
