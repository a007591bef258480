"""AdamW, as torch has it."""

from __future__ import annotations

from typing import Any

import torch


def adamw(
    groups: list[dict[str, Any]], weight_decay: float, beta1: float = 0.9, beta2: float = 0.98
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) with CLIP's betas."""
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=weight_decay, betas=(beta1, beta2), foreach=False)


OPTIMIZER = adamw
