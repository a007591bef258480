"""Linear layers and attention over weights in oneDNN's own layout, packed once.

Eager torch packs a half-precision weight anew in every call: for one image of a ViT-B-32 that is most of the work. What
``torch.compile`` does when it freezes a graph is done here to single layers: it takes milliseconds, and layers of
different adapters can share a weight that they have in common.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch has the layout for this precision."""
    try:
        linear = PackedLinear(pack(torch.ones(16, 16, dtype=dtype)), None)
        return bool(torch.isfinite(linear(torch.ones(1, 16, dtype=dtype))).all())
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def pack(weight: torch.Tensor) -> torch.Tensor:
    """An opaque tensor [out, in] in the layout that multiplies fastest."""
    operators: Any = torch._C._nn
    packed: torch.Tensor = operators.mkldnn_reorder_linear_weight(weight.detach().contiguous().to_mkldnn())
    return packed


class PackedLinear(nn.Module):
    """``x W^T + b`` for inference. The tensors are plain attributes: nothing moves or copies an opaque one."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """``weight``: from :func:`pack`; ``bias``: of the same precision."""
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """``[..., out]`` of ``[..., in]``."""
        outputs: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
        return outputs


class PackedAttention(nn.Module):
    """Self-attention in place of a batch-first ``nn.MultiheadAttention``: the same call, the same result."""

    def __init__(self, inward: PackedLinear, outward: PackedLinear, heads: int) -> None:
        super().__init__()
        self.inward, self.outward, self.heads = inward, outward, heads
        self.batch_first = True

    def forward(
        self, query: torch.Tensor, *_: torch.Tensor, attn_mask: torch.Tensor | None = None, **__: Any
    ) -> tuple[torch.Tensor, None]:
        """``[n, length, width]`` of the same; key and value are the query."""
        count, length, width = query.shape
        parts = self.inward(query).view(count, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], attn_mask=attn_mask)
        return self.outward(attended.transpose(1, 2).reshape(count, length, width)), None


def is_self_attention(owner: nn.Module, module: nn.Module) -> bool:
    """Whether a block's attention is of its input to itself, the only kind that :class:`PackedAttention` computes."""
    from open_clip.transformer import ResidualAttentionBlock

    return (
        isinstance(owner, ResidualAttentionBlock)
        and not hasattr(owner, "ln_1_kv")
        and isinstance(module, nn.MultiheadAttention)
        and module.batch_first
        and module.in_proj_weight is not None
        and module.bias_k is None
        and not module.add_zero_attn
    )
