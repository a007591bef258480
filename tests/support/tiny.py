"""A tiny random CLIP and random adapters for it: the real classes, in milliseconds."""

from __future__ import annotations

from pathlib import Path

import open_clip.model
import torch
from torch import nn

from serving.engines.adapters import write_adapter
from serving.engines.base import ClipBase, load_base, save_base
from serving.engines.preprocess import Preprocess

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
RANK = 4


def tiny_base(home: Path, name: str = "tiny", seed: int = 0) -> ClipBase:
    """A random ViT (32 px, 2 x 64) and text transformer (2 x 64, context 16), 32 dimensions, in ``home/bases``."""
    if (home / "bases" / name / "base.json").is_file():
        return load_base(home, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.model.CLIP(**CONFIG)
    return save_base(
        home,
        name,
        model.eval(),
        CONFIG,
        Preprocess(size=32),
        {"kind": "simple", "kwargs": {}},
        about={"source": "random weights, for tests"},
    )


def tiny_adapter(
    base: ClipBase,
    directory: Path,
    seed: int,
    scale: float = 0.5,
    towers: tuple[str, ...] = ("image", "text"),
) -> str:
    """Write a random LoRA adapter into the new folder ``directory``; returns its name.

    ``scale`` is about the size of the change relative to the weights; ``towers`` limits what it touches.
    """
    made = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}

    def pair(module: str, weight: torch.Tensor) -> None:
        out, inner = weight.shape
        size = scale * float(weight.std()) / RANK**0.5
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, inner, generator=made)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, RANK, generator=made) * size

    for name, module in base.build_model().named_modules():
        tower = "image" if name.startswith("visual.") else "text"
        if tower not in towers:
            continue
        if isinstance(module, nn.MultiheadAttention):
            pair(name, module.in_proj_weight)
            pair(f"{name}.base_layer.out_proj", module.out_proj.weight)
        elif name.endswith(("c_fc", "c_proj")):
            pair(name, module.weight)
    config = {"r": RANK, "lora_alpha": RANK, "target_modules": ["attn", "c_fc", "c_proj"]}
    return write_adapter(directory, tensors, config, base)
