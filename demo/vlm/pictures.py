"""Pictures for training: read once, then warped, mirrored and recoloured each time they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from core.progress import track
from demo.vlm.model import SIDE
from ratchet_client.images import decode_image

STORED = 128
"""Pixels per side of stored and warped pictures; the model sees half of it."""


def read_pictures(paths: Sequence[Path], label: str) -> torch.Tensor:
    """``uint8 [n, 3, 128, 128]``."""

    def one(path: Path) -> np.ndarray:
        pixels = np.asarray(decode_image(path.read_bytes()))
        if pixels.shape[:2] != (STORED, STORED):
            raise ValueError(f"{path} has {pixels.shape[:2]} pixels, not {STORED}")
        return pixels

    out = torch.empty(len(paths), 3, STORED, STORED, dtype=torch.uint8)
    with ThreadPoolExecutor(2) as pool:
        for row, pixels in enumerate(track(pool.map(one, paths), label, total=len(paths))):
            out[row] = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    return out


def warp(images: torch.Tensor, generator: torch.Generator, strength: float = 1.0) -> torch.Tensor:
    """``float [n, 3, 128, 128]`` in 0..1: images rotated, scaled, moved and sometimes mirrored, on white."""
    n = len(images)

    def spread(low: float, high: float) -> torch.Tensor:
        middle, half = (low + high) / 2, (high - low) / 2
        return middle + (2 * torch.rand(n, generator=generator) - 1) * half

    angle = spread(-0.2, 0.2) * strength
    wide = torch.exp(spread(-0.12, 0.35) * strength)
    high = wide * torch.exp(spread(-0.12, 0.12) * strength)
    mirror = 1 - 2 * (torch.rand(n, generator=generator) < 0.4).float()
    rows = [
        torch.stack([angle.cos() * wide * mirror, -angle.sin() * high, spread(-0.15, 0.15) * strength], dim=1),
        torch.stack([angle.sin() * wide * mirror, angle.cos() * high, spread(-0.15, 0.15) * strength], dim=1),
    ]
    grid = functional.affine_grid(torch.stack(rows, dim=1), [n, 3, STORED, STORED], align_corners=False)
    ink = 1 - images.float() / 255  # zero padding of the ink is white
    return 1 - functional.grid_sample(ink, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def recolour(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Make some grey, with swapped or inverted colours, or on tinted paper, so that only shape is informative."""
    images = images.clone()
    dice = torch.rand(len(images), generator=generator)
    grey, swapped = dice < 0.15, (dice >= 0.15) & (dice < 0.3)
    inverted, tinted = (dice >= 0.3) & (dice < 0.37) | (dice < 0.04), dice > 0.75
    images[grey] = images[grey].mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    images[swapped] = images[swapped][:, torch.randperm(3, generator=generator)]
    images[inverted] = 1 - images[inverted]
    if bool(tinted.any()):
        chosen = images[tinted]
        paper = (chosen.amin(dim=1, keepdim=True) > 0.94).float()
        tint = torch.rand(len(chosen), 3, 1, 1, generator=generator)
        images[tinted] = chosen * (1 - paper) + tint * paper
    return images


def shade(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Vary brightness and contrast slightly, without changing the names of colours."""
    factor = 0.88 + 0.24 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return (1 - (1 - images) * factor).clamp(0, 1)


def seen(images: torch.Tensor) -> torch.Tensor:
    """Images in 0..1 as the model's processor outputs them: 64 px, in -1..1."""
    small = functional.interpolate(images, size=(SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
    return small.clamp(0, 1) * 2 - 1
