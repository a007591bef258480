"""FLOPs of what really runs, operation by operation. A multiply-add counts 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """torch's counter, that sees all attention: it gets the formula of the CPU's kernel, which it does not know, and
    the fused layers of inference, of which it knows nothing, are switched off. Nor does it count the weights'
    gradient of a depthwise convolution as one of all channels with all channels.
    """
    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        aten.convolution_backward: _convolution_backward,
    }
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False, custom_mapping=formulas) as flops:
            yield flops
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]


def _convolution_backward(grad: Any, inputs: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """Of inputs and of weights, each as much as the forward pass, whatever the groups."""
    _, _, _, _, transposed, _, _, wanted = rest
    return int(conv_flop_count(inputs, weight, grad, transposed=transposed)) * sum(map(bool, wanted[:2]))
