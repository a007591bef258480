"""Fixed inputs of a CLIP: what a replica runs before it serves an adapter, and what engines are compared on."""

from __future__ import annotations

import numpy as np

GOLDEN_TEXTS = ("a photo of a cat", "red", "a small house beside a lake, at night", "12 flags of the world")


def golden_pixels(size: int) -> np.ndarray:
    """``uint8 [4, size, size, 3]``: gradients and stripes made by integer arithmetic, the same everywhere."""
    i, y, x, c = np.ogrid[1:5, 0:size, 0:size, 0:3]
    pattern: np.ndarray = (x * 37 * i + y * 11 * (5 - i) + c * 83 + (x * y // 3) * i) % 256
    return pattern.astype(np.uint8)
