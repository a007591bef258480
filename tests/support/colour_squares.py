"""Noisy squares of four colours, which a tiny VLM learns to tell apart in seconds."""

from __future__ import annotations

import io
from typing import Final

import numpy as np
from PIL import Image

COLOURS: Final = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}


def colour_of(number: int) -> str:
    return list(COLOURS)[number % len(COLOURS)]


def square(number: int) -> np.ndarray:
    """uint8 [32, 32, 3]."""
    noise = np.random.default_rng(number).integers(-25, 26, (32, 32, 3))
    return np.clip(np.array(COLOURS[colour_of(number)]) + noise, 0, 255).astype(np.uint8)


def encoded_square(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(square(number)).save(stream, "PNG")
    return stream.getvalue()
