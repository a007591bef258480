"""Counts FLOPs operation by operation, as they run. A multiply-add counts 2."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import conv_flop_count, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from updater.budget.bound import BudgetSpent


class FlopCount(TorchDispatchMode):
    """Sum of torch's FLOP formulas, without the module tracking of its FlopCounterMode, which is four times as slow.
    ``limit``: GFLOPs; raises BudgetSpent instead of running the operation that would exceed them."""

    def __init__(self, formulas: Mapping[Any, Any], limit: float = math.inf) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gflops = 0.0
        self._total, self._limit = 0, limit * 1e9
        self._formulas = {**flop_registry, **formulas}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = self._formulas.get(func.overloadpacket)
        if formula is None and _is_composite(func):  # composite that autograd did not decompose
            with self:
                return func.decompose(*args, **kwargs)
        if formula is not None:
            taken = formula(*args, **kwargs, out_val=_shape_after(func, args, kwargs))
            if self._total + taken > self._limit:
                raise BudgetSpent(self.gflops)
            self._total += taken
            self.gflops = self._total / 1e9
        return func(*args, **kwargs)


@cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _shape_after(func: Any, args: Any, kwargs: Any) -> Any:
    if func.overloadpacket not in (torch.ops.aten.convolution, torch.ops.aten._convolution):
        return None
    with _disable_current_modes():  # another counter must not count it
        without_values = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return func(*without_values[0], **without_values[1])


@contextmanager
def counted(limit: float = math.inf) -> Iterator[FlopCount]:
    """Count FLOPs inside the context. Fixes torch's counting: it adds the formula of the CPU's attention kernel,
    switches off the fused inference layers (which have none), and does not count the weight gradient of a depthwise
    convolution as one of all channels with all channels. Raises BudgetSpent before ``limit`` GFLOPs are exceeded."""
    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        aten.convolution_backward: _convolution_backward,
    }
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCount(formulas, limit) as flops:
            yield flops
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _convolution_backward(grad: Any, inputs: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """FLOPs of the gradients of inputs and weights, each as many as the forward pass, whatever the groups."""
    _, _, _, _, transposed, _, _, wanted = rest
    forward = conv_flop_count(inputs.shape, weight.shape, grad.shape, transposed=transposed)
    return int(forward) * sum(map(bool, wanted[:2]))
