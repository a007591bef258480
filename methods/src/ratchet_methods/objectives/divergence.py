"""Row-wise divergence between the distributions of two models."""

from __future__ import annotations

import torch
from torch import Tensor


def row_divergence(teacher: Tensor, student: Tensor, masked: Tensor | None = None) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) of each row [n], in nats, from logits [n, m]. Columns where ``masked``
    bool [n, m] is true are excluded from both distributions. A fully masked row gives 0."""
    if masked is None:
        masked = torch.zeros_like(teacher, dtype=torch.bool)
    empty = masked.all(dim=1, keepdim=True)
    outside = masked & ~empty  # a softmax over nothing would be NaN, and its gradient as well
    old = teacher.masked_fill(outside, -torch.inf).log_softmax(dim=1)
    new = student.masked_fill(outside, -torch.inf).log_softmax(dim=1)
    return (old.exp() * (old - new).masked_fill(outside, 0)).sum(dim=1).masked_fill(empty[:, 0], 0)
