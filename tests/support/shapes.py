"""Coloured shapes with captions: a domain that a tiny random CLIP learns within seconds."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from streams.folders import FolderItem, write_folder

COLOURS = {"red": (220, 30, 30), "green": (30, 170, 60), "blue": (40, 70, 220), "yellow": (240, 210, 40)}
SHAPES = ("circle", "square", "bar")


def shapes(folder: Path, copies: int, seed: int = 0, split: str = "train") -> Path:
    """Write ``copies`` pictures of every coloured shape, each at another place on another noise."""
    random = np.random.default_rng(seed)
    items = []
    (folder / "img").mkdir(parents=True)
    for number, (colour, shape, _) in enumerate(itertools.product(COLOURS, SHAPES, range(copies))):
        path = folder / "img" / f"{number:04}.png"
        path.write_bytes(_draw(colour, shape, random))
        text = f"a {colour} {shape}"
        items.append(FolderItem(path=path, text=text, label=shape, concept=f"{text} {number}", split=split))
    write_folder(folder, items)
    return folder


def _draw(colour: str, shape: str, random: np.random.Generator) -> bytes:
    image = Image.fromarray(random.integers(0, 90, (48, 48, 3), dtype=np.uint8))
    x, y = (int(value) for value in random.integers(2, 18, 2))
    size = int(random.integers(20, 28))
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((x, y, x + size, y + size), fill=COLOURS[colour])
    else:
        pen.rectangle((x, y, x + size, y + (size if shape == "square" else size // 3)), fill=COLOURS[colour])
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
