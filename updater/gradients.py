"""Gradient harmonization: no term of the loss pulls against another one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def harmonized_backward(terms: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> None:
    """Put into ``grad`` the sum of the terms' gradients, each projected off those that it conflicts with.

    Where ``g_i . g_j < 0``, ``g_i <- g_i - (g_i . g_j) / |g_j|^2 g_j`` (gradient surgery, Yu et al. 2020), in the order
    of the terms, so that the result is a function of them alone.
    """
    gradients = [_flat(term, parameters) for term in terms]
    whole = torch.zeros_like(gradients[0])
    for number, gradient in enumerate(gradients):
        own = gradient.clone()
        for other in gradients[:number] + gradients[number + 1 :]:
            against = torch.dot(own, other)
            if against < 0:
                own -= against / other.square().sum() * other
        whole += own
    at = 0
    for parameter in parameters:
        parameter.grad = whole[at : at + parameter.numel()].view_as(parameter).clone()
        at += parameter.numel()


def _flat(term: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    found = torch.autograd.grad(term, list(parameters), retain_graph=True, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    )
