"""Optimizers, learning-rate schedules, and running means of parameters. An optimizer is AdamW, or a plugin: a function
``(groups, weight_decay, **options)`` that returns a ``torch.optim.Optimizer``. Its state must be tensors by parameter,
so that a checkpoint can hold it without pickle.

Schedules have no horizon by default, because a stream has no last step. *infinite* (Infinite LR): linear warm-up,
cosine cool-down to a constant rate, and an exponential anneal only before a candidate is handed over. Updates that
start from an incumbent skip the peak and its cool-down: they warm up to the constant rate. *rsqrt*: linear warm-up,
then peak x sqrt(W / step), with the same anneal. *cosine*: linear warm-up, then down to ``final`` over the steps of
each update, as is usual in papers; it has a horizon. Each update begins without optimizer moments, so that its first
steps are as long as the rate allows whatever the gradient. So each warms up, for at most a quarter of its steps (except
*cosine*) so that a short one still learns. A meta-schedule (FoMo-in-Flux) may lower the rates from update to update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from updater.recipes import Optimizer, Schedule
from updater.recipes.plugin_registry import Methods


def adamw(
    groups: list[dict[str, Any]], weight_decay: float, beta1: float = 0.9, beta2: float = 0.98
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) with CLIP's betas."""
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=weight_decay, betas=(beta1, beta2), foreach=False)


OPTIMIZERS: Final[Methods[Callable[..., torch.optim.Optimizer]]] = Methods("optimizers", "optimizer", {"adamw": adamw})


def make(optimizer: Optimizer, groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
    """Create a recipe's optimizer. Raises ConfigError for an unknown kind or option."""
    factory = OPTIMIZERS.find(optimizer.kind)
    with OPTIMIZERS.options_of(optimizer.kind):
        return factory(groups, weight_decay, **optimizer.options)


def state_bytes(optimizer: torch.optim.Optimizer, parameter: Tensor) -> int:
    """Bytes of an optimizer's state for a parameter: its own ``state_bytes``, or Adam's two moments."""
    own = getattr(optimizer, "state_bytes", None)
    return int(own(parameter)) if own else 2 * parameter.nbytes


def learning_rate(schedule: Schedule, step: int, steps: int, first: bool, update: int = 0) -> float:
    """Learning rate of ``step`` (from 0) of ``steps`` in this update. ``first``: whether the update starts from the
    base; later ones warm up to the constant phase. ``update``: number of earlier updates, for the meta-schedule."""
    return meta_factor(schedule, update, steps) * _rate(schedule, step, steps, first)


def meta_factor(schedule: Schedule, update: int, steps: int) -> float:
    """*rsqrt*: sqrt((k + 1) W / (k S + W)) after k updates of S steps, with W warm-up steps; 1 in the first update, and
    where W > S. It falls to sqrt(W / S), and not to 0, so that an endless stream is still learned."""
    warm = max(schedule.warmup_steps, 1)
    if schedule.updates == "constant" or warm >= steps:
        return 1.0
    return math.sqrt((update + 1) * warm / (update * steps + warm))


def _rate(schedule: Schedule, step: int, steps: int, first: bool) -> float:
    if schedule.kind == "cosine":
        warm = min(schedule.warmup_steps, steps)
        if step < warm:
            return schedule.peak * (step + 1) / warm
        return _cosine(schedule.peak, schedule.final, (step - warm + 1) / (steps - warm))
    rate = _endless(schedule, step, first)
    anneal, left = min(schedule.anneal_steps, steps), steps - step
    if anneal and left <= anneal:
        start = _endless(schedule, steps - anneal, first)
        rate = float(start * (schedule.final / start) ** ((anneal - left + 1) / anneal))
    return rate * min(1.0, (step + 1) / max(min(schedule.warmup_steps, steps // 4), 1))


def _cosine(high: float, low: float, done: float) -> float:
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * done))


def _endless(schedule: Schedule, step: int, first: bool) -> float:
    warm = schedule.warmup_steps
    if schedule.kind == "rsqrt":
        return schedule.peak * math.sqrt(max(warm, 1) / max(step + 1, warm, 1))
    if not first:
        return schedule.constant
    cool = schedule.cooldown_steps
    if step < warm:
        return schedule.peak
    if step < warm + cool:
        return _cosine(schedule.peak, schedule.constant, (step - warm + 1) / cool)
    return schedule.constant


class Average:
    """theta_bar <- (n theta_bar + theta) / (n + 1) every ``every`` steps, including the start (ZSCL, Zheng et al.
    2023). For factors it is the mean of the factors, not of their product."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], every: int) -> None:
        self.every = every
        self.steps = 0
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def stepped(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            self.values = self._with(parameters)

    @torch.no_grad()
    def apply(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Set the parameters to the mean, including their current values even between multiples of ``every``."""
        mean = self._with(parameters) if self.steps % self.every else self.values
        for name, parameter in parameters.items():
            parameter.copy_(mean[name])

    def _with(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        share = 1 / (-(-self.steps // self.every) + 1)
        return {name: value.lerp(parameters[name].detach(), share) for name, value in self.values.items()}

    def state(self) -> dict[str, Tensor]:
        return {"steps": torch.tensor(self.steps)} | {f"value.{name}": value for name, value in self.values.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
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
        keep, new, start = self.shares
        for name, value in self.values.items():
            value.mul_(keep).add_(parameters[name], alpha=new).add_(self.start[name], alpha=start)
