"""Slow copies of the parameters along an update: their mean, which is flatter and nearer to the start, and a momentum
model, which teaches the student.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Average:
    """theta_bar <- (n theta_bar + theta) / (n + 1) every ``every`` steps, the start being the first (ZSCL, Zheng et al.
    2023). For factors it is the mean of the factors, not of their product.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], every: int) -> None:
        self.every = every
        self.steps = 0
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def stepped(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take the parameters in after every so many steps."""
        self.steps += 1
        if self.steps % self.every == 0:
            self.values = self._with(parameters)

    @torch.no_grad()
    def settle(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Set the parameters to the mean; where they stand counts in it, however few steps ago the last one was."""
        mean = self._with(parameters) if self.steps % self.every else self.values
        for name, parameter in parameters.items():
            parameter.copy_(mean[name])

    def _with(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        share = 1 / (-(-self.steps // self.every) + 1)
        return {name: value.lerp(parameters[name].detach(), share) for name, value in self.values.items()}

    def state(self) -> dict[str, Tensor]:
        """What a resumed update needs."""
        return {"steps": torch.tensor(self.steps)} | {f"value.{name}": value for name, value in self.values.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` gave."""
        self.steps = int(tensors["steps"])
        self.values = {name: tensors[f"value.{name}"].to(value.device) for name, value in self.values.items()}


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
