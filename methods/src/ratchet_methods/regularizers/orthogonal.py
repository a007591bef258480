"""O-LoRA: each update learns in a subspace orthogonal to those of earlier ones (Wang et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from updater.methods.regularizers import Gradients, Parameters, Regularizer

SIDE = ".lora_A"


class Orthogonal(Regularizer):
    """``sum |A_i A^T|`` over layers and all earlier updates i; the recipe's weight is lambda. A are the rows [r, in] of
    the LoRA factors that read a layer's input. Those of earlier updates are kept at unit length. Useful only if each
    update learns its own factors: ``merge.start: base``. ``most``: rows to keep per layer, those of the newest updates.
    """

    def __init__(self, most: int = 256) -> None:
        if most < 1:
            raise TypeError(f"most is {most}, and must be at least 1")
        self.most = most
        self.rows: dict[str, Tensor] = {}

    def __call__(self, parameters: Parameters) -> Tensor:
        first = next(iter(parameters.values()))
        terms = [
            (self.rows[name].to(p) @ p.flatten(1).T).abs().sum() for name, p in parameters.items() if name in self.rows
        ]
        return torch.stack([first.new_zeros(()), *terms]).sum()

    def finish(self, parameters: Parameters, gradients: Gradients) -> None:
        for name, parameter in parameters.items():
            if name.endswith(SIDE):
                rows = torch.nn.functional.normalize(parameter.detach().flatten(1), dim=1)
                known = self.rows.get(name)
                self.rows[name] = (rows if known is None else torch.cat([known.to(rows), rows]))[-self.most :]

    def state(self) -> dict[str, Tensor]:
        return dict(self.rows)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.rows = dict(tensors)
