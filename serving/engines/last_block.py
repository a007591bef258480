"""The last block of a transformer, for the one token of each row that is read of it.

A CLIP tower pools one token. Keys and values of the last block are of all tokens; its query, its projection and its
perceptron (10 of 12 parts of a block's work) need that token only: 7% of a tower of 12 blocks.
"""

from __future__ import annotations

from typing import Any

import torch

from core.priority import breathe


def has_plain_last_block(transformer: Any) -> bool:
    """Whether a transformer ends with open_clip's own block of self-attention, rows first."""
    from open_clip.transformer import ResidualAttentionBlock

    blocks = getattr(transformer, "resblocks", None)
    if not blocks or not isinstance(blocks[-1], ResidualAttentionBlock):
        return False
    return bool(getattr(transformer, "batch_first", False)) and not hasattr(blocks[-1], "ln_1_kv")


def through_blocks(
    transformer: Any, hidden: torch.Tensor, token: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """``[n, 1, width]``: what ``transformer(hidden, attn_mask=mask)`` has at ``token``, for hidden [n, length, width].

    Args:
        token: int64 [n], the place that is read of each row.
        mask: ``[length, length]``, added to attention.
    """
    *blocks, last = transformer.resblocks
    for block in blocks:
        hidden = block(hidden, attn_mask=mask)
        breathe()  # a whole pass at once, of golden inputs, is longer than a request
    keys = last.ln_1(hidden)
    place = token[:, None, None].expand(-1, 1, hidden.shape[2])
    heads = None if mask is None else mask.to(keys.dtype)[token].repeat_interleave(last.attn.num_heads, 0)[:, None]
    attended = last.attn(keys.gather(1, place), keys, keys, need_weights=False, attn_mask=heads)[0]
    hidden = hidden.gather(1, place) + last.ls_1(attended)
    return torch.as_tensor(hidden + last.ls_2(last.mlp(last.ln_2(hidden))))
