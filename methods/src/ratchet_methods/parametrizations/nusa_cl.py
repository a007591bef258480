"""NuSA-CL: learn where a weight has the least energy (null-space adaptation for continual learning)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ratchet_methods.parametrizations.parametrization import Parametrization, matrix


class NusaCl(Parametrization):
    """W' = W + U_n M V_n^T; U_n, V_n are the ``rank`` last singular directions of W, frozen. Initially M = 0. W is the
    weight at the start of the update, so directions used by earlier updates are no longer free."""

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        u, _, vt = torch.linalg.svd(matrix(weight).double(), full_matrices=False)
        last = min(rank, len(vt))
        self.register_buffer("u", u[:, -last:].to(weight.dtype))
        self.register_buffer("v", vt[-last:].to(weight.dtype))
        self.middle = nn.Parameter(weight.new_zeros(last, last))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.v, self.u @ self.middle

    def state(self) -> dict[str, Tensor]:
        # The signs of singular directions are arbitrary: another machine's would not fit the M of a checkpoint.
        return {"u": self.u, "v": self.v}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.u.copy_(tensors["u"])
        self.v.copy_(tensors["v"])
