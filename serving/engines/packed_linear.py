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
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
    return packed


class PackedLinear(nn.Module):
    """``x W^T + b`` for inference, or a GELU of it.

    The tensors are plain attributes: nothing moves or copies an opaque one.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, gelu: nn.GELU | None = None) -> None:
        """``weight``: from :func:`pack`; ``bias``: of the same precision; ``gelu``: that comes next, computed on the
        way.
        """
        super().__init__()
        self.weight = weight
        self.bias = bias
        self._after: tuple[str, list[Any], str] = ("none", [], "") if gelu is None else ("gelu", [], gelu.approximate)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """``[..., out]`` of ``[..., in]``."""
        outputs: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, *self._after)
        return outputs


class PackedAttention(nn.Module):
    """Self-attention in place of a batch-first ``nn.MultiheadAttention``: the same call, the same result."""

    def __init__(self, inward: PackedLinear, outward: PackedLinear, heads: int) -> None:
        super().__init__()
        self.inward, self.outward, self.num_heads = inward, outward, heads
        self.batch_first = True

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, *_: torch.Tensor, attn_mask: torch.Tensor | None = None, **__: Any
    ) -> tuple[torch.Tensor, None]:
        """``[n, length of the query, width]``. Keys and values are of ``key``; the query is the same, or some of it."""
        parts = self.inward(key)
        own = parts if query is key else self.inward(query)
        return self.outward(attend(own, parts, self.num_heads, attn_mask)), None


def attend(query: torch.Tensor, parts: torch.Tensor, heads: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """``[n, length, width]`` of projections ``[n, length, 3 * width]``: the first third of ``query``, the others of
    ``parts``. ``mask``: as ``nn.MultiheadAttention`` takes it, ``[length, length]`` or ``[n * heads, length, length]``.
    """
    count, length, three = query.shape
    split = (count, -1, 3, heads, three // 3 // heads)
    first = query.view(split).permute(2, 0, 3, 1, 4)[0]
    _, keys, values = parts.view(split).permute(2, 0, 3, 1, 4).unbind(0)
    if mask is not None and mask.dim() == 3:
        mask = mask.view(count, heads, *mask.shape[1:])
    attended = functional.scaled_dot_product_attention(first, keys, values, attn_mask=mask)
    return attended.transpose(1, 2).reshape(count, length, three // 3)


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
