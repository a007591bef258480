"""GaLore: Adam in a low-rank subspace of each matrix's gradient, which saves its moments' memory (Zhao et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class GaLore(torch.optim.Optimizer):
    """G [m, n] with m <= n becomes R = P^T G [rank, n]; the update is ``lr scale P Adam(R)``. For m > n, G^T is used. P
    holds the first left singular vectors of the gradient, recomputed every ``every`` steps; moments are kept then, as
    in the paper. Vectors, and matrices with at most ``rank`` rows or columns, use plain AdamW."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        weight_decay: float,
        rank: int = 16,
        every: int = 50,
        scale: float = 2.0,
        beta1: float = 0.9,
        beta2: float = 0.98,
    ) -> None:
        if rank < 1 or every < 1:
            raise TypeError("rank or every is below 1")
        self.rank, self.every, self.scale = rank, every, scale
        self.betas = beta1, beta2
        super().__init__(groups, {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                change = self._change(parameter, parameter.grad)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=group["lr"])

    def _change(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
        if not self._projects(parameter):
            return self._adam(state, gradient)
        matrix = _wide(gradient)
        if int(state["step"]) % self.every == 0:
            # eigh of the small square side: an embedding has tens of thousands of columns.
            state["projector"] = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -self.rank :].contiguous()
        projector = state["projector"]
        change = self.scale * (projector @ self._adam(state, projector.T @ matrix))
        rows = gradient.flatten(1)
        return (change if len(rows) == len(change) else change.T).reshape(gradient.shape)

    def _adam(self, state: dict[str, Tensor], gradient: Tensor) -> Tensor:
        if "first" not in state:
            state["first"], state["second"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        one, two = self.betas
        state["step"] += 1
        step = float(state["step"])
        first = state["first"].mul_(one).add_(gradient, alpha=1 - one)
        second = state["second"].mul_(two).addcmul_(gradient, gradient, value=1 - two)
        change: Tensor = first / (1 - one**step) / ((second / (1 - two**step)).sqrt() + 1e-8)
        return change

    def _projects(self, parameter: Tensor) -> bool:
        return parameter.dim() > 1 and min(parameter.flatten(1).shape) > self.rank

    def state_bytes(self, parameter: Tensor) -> int:
        if not self._projects(parameter):
            return 2 * parameter.numel() * parameter.element_size()
        short, long = sorted(parameter.flatten(1).shape)
        return self.rank * (short + 2 * long) * parameter.element_size()


def _wide(gradient: Tensor) -> Tensor:
    rows = gradient.flatten(1)
    return rows if rows.shape[0] <= rows.shape[1] else rows.T
