"""Distinct JPEG images of a given size in bytes: crops of a canvas of noise at many scales, as in photographs."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

BYTES_A_PIXEL = 0.25
SENSOR_NOISE = 6.0
"""Standard deviation, in grey levels."""
PROBES = 4


@dataclass(frozen=True, slots=True)
class Canvas:
    """A canvas that images are cut from."""

    image: Image.Image
    side: int
    """Of a crop, in pixels."""
    quality: int


def canvas(size: int, seed: int = 0) -> Canvas:
    """A canvas whose crops have about ``size`` bytes as JPEG."""
    generator = np.random.default_rng(seed)
    side = max(16, round((size / BYTES_A_PIXEL) ** 0.5))
    image = _noise(side * 3 // 2, generator)
    sizes = {quality: _mean_size(image, side, quality) for quality in range(40, 97, 4)}
    return Canvas(image, side, min(sizes, key=lambda quality: abs(sizes[quality] - size)))


def jpegs(source: Canvas, count: int, seed: int = 0) -> Iterator[bytes]:
    generator = np.random.default_rng(seed + 1)
    room = source.image.width - source.side
    for _ in range(count):
        left, top = generator.integers(0, room + 1, 2)
        light = generator.uniform(0.7, 1.1, 3)
        tables = [min(255, round(level * gain)) for gain in light for level in range(256)]
        yield _encode(_crop(source.image, int(left), int(top), source.side).point(tables), source.quality)


def _noise(side: int, generator: np.random.Generator) -> Image.Image:
    """Noise whose amplitude falls with its frequency, over a gradient, plus sensor noise; [side, side, 3]."""
    slope = np.linspace(60, 180, side, dtype=np.float32)
    total = np.repeat(np.repeat(slope[:, None, None], side, 1), 3, 2)
    cells, amplitude = 3, 80.0
    while cells < side:
        small = generator.integers(0, 256, (cells, cells, 3), np.uint8)
        layer = Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)
        total += (np.asarray(layer, np.float32) / 127.5 - 1) * amplitude
        cells, amplitude = cells * 2, amplitude * 0.6
    total += generator.normal(0, SENSOR_NOISE, total.shape[:2]).astype(np.float32)[..., None]
    return Image.fromarray(np.clip(total, 0, 255).astype(np.uint8))


def _mean_size(image: Image.Image, side: int, quality: int) -> float:
    room = image.width - side
    starts = [room * number // PROBES for number in range(PROBES)]
    return sum(len(_encode(_crop(image, start, start, side), quality)) for start in starts) / PROBES


def _crop(image: Image.Image, left: int, top: int, side: int) -> Image.Image:
    return image.crop((left, top, left + side, top + side))


def _encode(image: Image.Image, quality: int) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()
