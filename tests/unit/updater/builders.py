"""Small pools, recipes and batches for the updater's tests."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from serving.engines.base import ClipBase
from updater.objectives import Features
from updater.pools import Pair, Pools
from updater.recipes import Part, Recipe, load_recipe
from updater.train import Limits, TrainResult, train

COLOURS = ("red", "green", "blue", "yellow", "black", "white")
LIMITS = Limits(gflops=1e6, seconds=120, threads=1, checkpoint_steps=2)


def picture(number: int, side: int = 24) -> bytes:
    """A PNG of noise, different for each number."""
    pixels = np.random.default_rng(number).integers(0, 255, (side, side + 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pairs(tag: str, count: int) -> tuple[Pair, ...]:
    """Pairs whose captions repeat every six."""
    return tuple(
        Pair(f"{tag}-{i}", f"a {COLOURS[i % 6]} {tag}", lambda i=i: picture(hash_of(tag) + i)) for i in range(count)
    )


def hash_of(tag: str) -> int:
    """A number from a word, the same in every process."""
    return sum(ord(letter) * 31**place for place, letter in enumerate(tag)) % 100_000


def pools(new: int = 20, reference: int = 20, replay: int = 0) -> Pools:
    """Three pools of pairs."""
    return Pools(pairs("car", new), pairs("house", reference), pairs("tree", replay))


def recipe(name: str = "default", **changes: Any) -> Recipe:
    """A shipped recipe made small."""
    small = {"max_steps": 5, "batch_size": 9, "rank": 4, "alpha": 8.0}
    values = load_recipe(name).model_dump(mode="json")
    return Recipe.parse({**values, **small, **changes})


def run(base: ClipBase, folder: Path, **options: Any) -> TrainResult:
    """Train into ``folder`` with small defaults."""
    given: dict[str, Any] = {
        "recipe": recipe(), "pools": pools(), "incumbent": None, "seed": 3, "limits": LIMITS,
        "out_dir": folder / "adapters", "work_dir": folder / "work", "device": "cpu", **options,
    }  # fmt: skip
    return train(base, **given)


def batch(captions: list[int], parts: list[Part] | None = None, dim: int = 6, seed: int = 0) -> Features:
    """Random unit features with gradients, and other random ones as the teacher's."""
    made = torch.Generator().manual_seed(seed)
    image, text, old_image, old_text = (
        F.normalize(torch.randn(len(captions), dim, generator=made), dim=1) for _ in range(4)
    )
    return Features(
        image=image.requires_grad_(),
        text=text.requires_grad_(),
        teacher_image=old_image,
        teacher_text=old_text,
        caption=torch.tensor(captions),
        part=tuple(parts or ["new"] * len(captions)),
        scale=7.0,
    )
