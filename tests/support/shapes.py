"""Coloured shapes with captions: a domain that a tiny random CLIP learns within seconds."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from streams.publish.folders import FolderItem, write_folder

COLOURS = {"red": (220, 30, 30), "green": (30, 170, 60), "blue": (40, 70, 220), "yellow": (240, 210, 40)}
SHAPES = ("circle", "square", "bar")
SIZES = {"small": 14, "large": 26}
ACROSS, DOWN = {"left": 0, "middle": 1, "right": 2}, {"top": 0, "centre": 1, "bottom": 2}


def shapes(folder: Path, copies: int, seed: int = 0, split: str = "train") -> Path:
    """Write ``copies`` pictures of every coloured shape, each on different noise, with 216 distinct captions."""
    random = np.random.default_rng(seed)
    items = []
    (folder / "img").mkdir(parents=True)
    for number, (colour, shape, _) in enumerate(itertools.product(COLOURS, SHAPES, range(copies))):
        path = folder / "img" / f"{number:04}.png"
        size, across, down = (str(random.choice(list(words))) for words in (SIZES, ACROSS, DOWN))
        path.write_bytes(_draw(colour, shape, size, across, down, random))
        text = f"a {size} {colour} {shape} at the {down} {across}"
        items.append(FolderItem(path=path, text=text, label=shape, concept=f"{text} {number}", split=split))
    write_folder(folder, items)
    return folder


def _draw(colour: str, shape: str, size: str, across: str, down: str, random: np.random.Generator) -> bytes:
    image = Image.fromarray(random.integers(0, 90, (48, 48, 3), dtype=np.uint8))
    edge = SIZES[size] + int(random.integers(-2, 3))
    x, y = (round(place * (48 - edge) / 2) for place in (ACROSS[across], DOWN[down]))
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((x, y, x + edge, y + edge), fill=COLOURS[colour])
    else:
        pen.rectangle((x, y, x + edge, y + (edge if shape == "square" else edge // 3)), fill=COLOURS[colour])
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
