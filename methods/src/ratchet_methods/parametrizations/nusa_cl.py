"""NuSA-CL: learning happens where a weight has least energy (null-space adaptation for continual learning)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ratchet_methods.parametrizations.parametrization import Parametrization, matrix


class NusaCl(Parametrization):
    """W' = W + U_n M V_n^T; U_n, V_n are the ``rank`` last singular directions of W, frozen. M = 0 at first.

    W is the weight as the update finds it, so that what an earlier update wrote there is no longer free.
    """

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
        # Singular directions have no sign of their own: another machine's would not fit the M of a checkpoint.
        return {"u": self.u, "v": self.v}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.u.copy_(tensors["u"])
        self.v.copy_(tensors["v"])
