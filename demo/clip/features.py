"""Frozen towers' features of folder datasets: computed once, then the projections train in seconds.

A feature is what enters the projection: the image trunk's pooled output, and the text transformer's pooled output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import nn

from core.progress import track
from serving.engines.preprocess import Preprocess
from serving.engines.tokens import Tokenizer
from streams.publish.folders import FolderItem

BATCH = 64


def load_pixels(items: Sequence[FolderItem], preprocess: Preprocess, batch: int = BATCH) -> Iterator[np.ndarray]:
    """``uint8 [n, size, size, 3]`` batches of the items' images, decoded on two threads ahead of use."""

    def one(item: FolderItem) -> np.ndarray:
        return preprocess.pixels(item.bytes())

    with ThreadPoolExecutor(2) as pool:
        for start in range(0, len(items), batch):
            yield np.stack(list(pool.map(one, items[start : start + batch])))


@torch.inference_mode()
def image_features(
    model: nn.Module, items: Sequence[FolderItem], preprocess: Preprocess, label: str, mirror: bool = False
) -> torch.Tensor:
    """``float32 [n, 1280]``: the trunk's pooled output; with ``mirror``, of the images flipped left to right."""
    trunk = model.get_submodule("visual.trunk").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    rows = []
    for pixels in track(load_pixels(items, preprocess), label, total=-(-len(items) // BATCH)):
        batch = preprocess.normalise(pixels[:, :, ::-1] if mirror else pixels)
        rows.append(trunk(batch.contiguous(memory_format=torch.channels_last)))
    return torch.cat(rows)


@torch.inference_mode()
def text_features(model: nn.Module, texts: Sequence[str], tokenize: Tokenizer, label: str) -> torch.Tensor:
    """``float32 [n, 384]``: mean-pooled output of the text transformer; texts go in by length, to pad little."""
    text: Any = model.get_submodule("text")
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows = torch.empty(len(texts), int(text.transformer.config.hidden_size))
    for start in track(range(0, len(order), BATCH), label):
        where = order[start : start + BATCH]
        ids = tokenize([texts[i] for i in where])
        mask = torch.ne(ids, text.transformer.config.pad_token_id).long()
        rows[where] = text.pooler(text.transformer(input_ids=ids, attention_mask=mask), mask)
    return rows
