"""Many models over one set of weights.

``torch.func.functional_call`` swaps tensors inside the one module for the time of the call, so that two threads
with two adapters would see each other's weights. A *shell* has the module tree of its own and the tensors in common:
it costs some milliseconds and no memory but for the weights that differ, and any number of threads may use it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from itertools import chain

import torch
from torch import nn


def shell_of(model: nn.Module, changed: Mapping[str, torch.Tensor]) -> nn.Module:
    """A model that shares every parameter and buffer with ``model`` but for ``changed`` (by parameter name)."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    shell = copy.deepcopy(model, dict(shared))
    for name, tensor in changed.items():
        owner, _, leaf = name.rpartition(".")
        shell.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    return shell


def private_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of memory that tensors need."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
