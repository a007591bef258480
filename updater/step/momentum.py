"""A momentum model: a slow copy of the student's parameters that teaches it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


class Momentum:
    """theta_m <- keep theta_m + new theta + start theta_start (CTP, Zhu et al. 2023: 0.9, 0.05, 0.05)."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], keep: float, new: float, start: float) -> None:
        self.shares = keep, new, start
        self.start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.values = {name: value.clone() for name, value in self.start.items()}

    @torch.no_grad()
    def stepped(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Follow the student after a step."""
        keep, new, start = self.shares
        for name, value in self.values.items():
            value.mul_(keep).add_(parameters[name], alpha=new).add_(self.start[name], alpha=start)
