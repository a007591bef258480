"""Deterministic inputs of benchmarks and tests: random adapters and drawn pictures."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from serving.engines.adapters import write_adapter
from serving.engines.clip_base import ClipBase
from serving.engines.vlm.vlm_base import VlmBase

TEXTS = ("a photo of a cat", "a red circle", "blue square on white", "an old map", "a smiling face", "two birds")
QUESTIONS = ("what is this?", "is there a red car?")


def random_adapter(
    base: ClipBase | VlmBase, folder: Path, seed: int, parts: Sequence[str] | None = None, rank: int = 8,
    scale: float = 0.3, targets: Sequence[str] = (),
) -> str:  # fmt: skip
    """Write an adapter of random weights and return its name. ``parts``: keys of the base's ``lora_targets``; all when
    unset. ``scale``: approximate size of the change, relative to the weights. ``targets``: of its configuration; by
    default a pattern of everything that it changes.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    touched: list[str] = []

    def pair(module: str, weight: torch.Tensor) -> None:
        tail = (1,) * (weight.dim() - 2)
        size = scale * float(weight.std()) / rank**0.5
        for name, shape, factor in (("A", (rank, weight.shape[1]), 1.0), ("B", (weight.shape[0], rank), size)):
            drawn = torch.randn(*shape, *tail, generator=generator) * factor
            tensors[f"base_model.model.{module}.lora_{name}.weight"] = drawn

    patterns = [re.compile(base.lora_targets[part]) for part in parts or base.lora_targets]
    for name, module in base.build_model().named_modules():
        if not any(pattern.fullmatch(name) for pattern in patterns):
            continue
        touched.append(name)
        if isinstance(module, nn.MultiheadAttention):
            pair(name, module.in_proj_weight)
            pair(f"{name}.base_layer.out_proj", module.out_proj.weight)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            pair(name, module.weight)
    named = list(targets) or f"(?:{'|'.join(re.escape(name) for name in touched)})"
    return write_adapter(folder, tensors, {"r": rank, "lora_alpha": rank, "target_modules": named}, base)


def pictures(count: int) -> list[bytes]:
    images = []
    random = np.random.default_rng(0)
    for _ in range(count):
        image = Image.new("RGB", (128, 128), tuple(int(v) for v in random.integers(0, 256, 3)))
        draw = ImageDraw.Draw(image)
        for _ in range(6):
            x, y, w, h = (int(v) for v in random.integers(0, 96, 4))
            draw.ellipse((x, y, x + w + 4, y + h + 4), fill=tuple(int(v) for v in random.integers(0, 256, 3)))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        images.append(buffer.getvalue())
    return images
