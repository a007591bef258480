"""Images through an image tower: a plain ViT computes its last block for the class token only."""

from __future__ import annotations

import torch
from torch import nn

from serving.engines.last_block import has_plain_last_block, through_blocks


def encode_image(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """``[n, dim]`` of normalised ``[n, 3, size, size]``: what the model's own ``encode_image`` gives."""
    visual = model.get_submodule("visual")
    if not _pools_class_token(visual):
        vectors: torch.Tensor = model.encode_image(batch)  # type: ignore[operator]
        return vectors
    hidden = visual._embeds(batch)  # type: ignore[operator]
    token = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)  # len() would be fixed in a trace
    hidden = through_blocks(visual.transformer, hidden, token)
    # The norm is of each token alone, so whether it comes before or after pooling is the same.
    pooled = visual.ln_post(hidden[:, 0])  # type: ignore[operator]
    return torch.as_tensor(pooled if visual.proj is None else pooled @ visual.proj)


def _pools_class_token(visual: nn.Module) -> bool:
    from open_clip.transformer import VisionTransformer

    return (
        isinstance(visual, VisionTransformer)
        and visual.pool_type == "tok"
        and visual.attn_pool is None
        and not visual.output_tokens
        and has_plain_last_block(visual.transformer)
    )
