"""Runs texts and images through the towers of a CLIP, skipping work that no vector depends on. In a causal text tower
that pools the end token, padding does not affect the vector. Towers without a causal mask see their padding, so this is
measured when a base is loaded. If one token is pooled, the last block needs keys and values of all tokens, but query,
projection and MLP of that token only, which saves 7% of a 12-block tower."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from core.priority import yield_cpu
from serving.engines.tokens import Tokenizer, pad_rows

GPU_BUCKET: Final = 8
"""Text widths on a GPU are multiples of this: each shape has a CUDA graph. On a CPU a new shape takes only
milliseconds, once, so widths are exact."""
SPREAD: Final = 2
"""Texts share a pass while the longest's width is at most this many times the shortest's."""
TOLERANCE: Final = 1e-4
"""Largest vector difference relative to its length; float32 rounding gives about 1e-6."""
POOLS: Final = ("first", "last", "argmax", "eos")
"""open_clip's ways to choose one token of a text."""
SAMPLES: Final = ("a", "a photo of a cat", "a small house beside a lake, at night, and 12 flags of the world")


def encode_text(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """``[n, dim]`` from ``int64 [n, width]``; ``width`` may be below the context length, unlike in open_clip."""
    tower = _plain_tower(model)
    if tower is None:
        vectors: torch.Tensor = model.encode_text(ids)  # type: ignore[operator]
        return vectors
    from open_clip.transformer import text_global_pool

    width, dtype, mask = ids.shape[1], tower.transformer.get_cast_dtype(), tower.attn_mask
    mask = None if mask is None else mask[:width, :width]
    hidden = tower.token_embedding(ids).to(dtype) + tower.positional_embedding[:width].to(dtype)
    pool = tower.text_pool_type if tower is model else tower.pool_type
    end = getattr(tower, "text_eos_id" if tower is model else "eos_id", None)
    if pool in POOLS and _has_plain_last_block(tower.transformer):
        places = torch.arange(width, device=ids.device).expand(ids.shape[0], -1)[..., None]
        token = text_global_pool(places, ids, pool, eos_token_id=end)[:, 0]
        pooled = _through_blocks(tower.transformer, hidden, token, mask)[:, 0]
    else:
        pooled = text_global_pool(tower.transformer(hidden, attn_mask=mask), ids, pool, eos_token_id=end)
    pooled = tower.ln_final(pooled)  # per token: after pooling, one token's work
    projection = tower.text_projection
    if projection is None:
        return torch.as_tensor(pooled)
    return torch.as_tensor(projection(pooled) if isinstance(projection, nn.Module) else pooled @ projection)


def _plain_tower(model: nn.Module) -> Any:
    """open_clip's text transformer of a model, or None; also None with a class token or a pad mask."""
    from open_clip.model import CLIP
    from open_clip.transformer import TextTransformer

    if isinstance(model, CLIP):
        return model
    text = getattr(model, "text", None)
    if isinstance(text, TextTransformer) and text.cls_emb is None and not text.use_pad_mask and not text.output_tokens:
        return text
    return None


@dataclass(frozen=True)
class TextWidths:
    context_length: int
    trims: bool
    """True if shorter IDs give the same vectors as full length."""
    bucket: int = 1
    """Widths are multiples of this many tokens."""

    @classmethod
    def prove(cls, model: nn.Module, tokenizer: Tokenizer, context_length: int, bucket: int = 1) -> TextWidths:
        """Compare vectors of short and long texts at their own and at full width, with a float32 model on the CPU."""
        trimmed = cls(context_length, True, bucket)
        rows = tokenizer.rows([*SAMPLES, " ".join(SAMPLES * 2)])
        with torch.inference_mode():
            ids = pad_rows(rows, context_length, tokenizer.pad_id)
            full = model.encode_text(ids)  # type: ignore[operator]
            for vector, row, padded in zip(full, rows, ids, strict=True):
                width = trimmed.width(len(row))
                try:
                    short = encode_text(model, padded[None, :width])[0]
                except (RuntimeError, ValueError, IndexError):  # the tower takes one width only
                    return cls(context_length, False, bucket)
                if not bool((short - vector).norm() <= TOLERANCE * vector.norm()):
                    return cls(context_length, False, bucket)
        return trimmed

    def width(self, length: int) -> int:
        """Width of a batch whose longest row has ``length`` tokens."""
        if not self.trims:
            return self.context_length
        return min(self.context_length, -(-length // self.bucket) * self.bucket)

    def passes(self, lengths: Sequence[int], most: int) -> Iterator[tuple[int, list[int]]]:
        """Yield width and indices of passes of at most ``most`` rows, grouped so that short texts skip long widths."""
        batch: list[int] = []
        for index in sorted(range(len(lengths)), key=lengths.__getitem__):
            full = len(batch) == most
            if batch and (full or self.width(lengths[index]) > SPREAD * self.width(lengths[batch[0]])):
                yield self.width(lengths[batch[-1]]), batch
                batch = []
            batch.append(index)
        if batch:
            yield self.width(lengths[batch[-1]]), batch


def encode_image(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """``[n, dim]`` from normalised ``[n, 3, size, size]``, equal to the model's own ``encode_image``."""
    visual = model.get_submodule("visual")
    if not _pools_class_token(visual):
        vectors: torch.Tensor = model.encode_image(batch)  # type: ignore[operator]
        return vectors
    hidden = visual._embeds(batch)  # type: ignore[operator]
    token = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)  # a trace would fix len()
    hidden = _through_blocks(visual.transformer, hidden, token)
    # The norm is per token, so it can follow pooling.
    pooled = visual.ln_post(hidden[:, 0])  # type: ignore[operator]
    return torch.as_tensor(pooled if visual.proj is None else pooled @ visual.proj)


def _pools_class_token(visual: nn.Module) -> bool:
    from open_clip.transformer import VisionTransformer

    return (
        isinstance(visual, VisionTransformer)
        and visual.pool_type == "tok"
        and visual.attn_pool is None
        and not visual.output_tokens
        and _has_plain_last_block(visual.transformer)
    )


def _has_plain_last_block(transformer: Any) -> bool:
    """True if the last block is open_clip's self-attention block, batch first."""
    from open_clip.transformer import ResidualAttentionBlock

    blocks = getattr(transformer, "resblocks", None)
    if not blocks or not isinstance(blocks[-1], ResidualAttentionBlock):
        return False
    return bool(getattr(transformer, "batch_first", False)) and not hasattr(blocks[-1], "ln_1_kv")


def _through_blocks(
    transformer: Any, hidden: torch.Tensor, token: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """``[n, 1, width]``: ``transformer(hidden, attn_mask=mask)`` at one position per row. ``hidden``: [n, length,
    width]; ``token``: int64 [n], the positions; ``mask``: [length, length], added to attention."""
    *blocks, last = transformer.resblocks
    for block in blocks:
        hidden = block(hidden, attn_mask=mask)
        yield_cpu()  # a whole pass of golden inputs takes longer than a request
    keys = last.ln_1(hidden)
    place = token[:, None, None].expand(-1, 1, hidden.shape[2])
    heads = None if mask is None else mask.to(keys.dtype)[token].repeat_interleave(last.attn.num_heads, 0)[:, None]
    attended = last.attn(keys.gather(1, place), keys, keys, need_weights=False, attn_mask=heads)[0]
    hidden = hidden.gather(1, place) + last.ls_1(attended)
    return torch.as_tensor(hidden + last.ls_2(last.mlp(last.ln_2(hidden))))
