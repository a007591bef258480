"""Which colours a drawing has, measured from its pixels."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

NAMES: Final = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "grey", "black", "")
"""The last one: pale or between two names, which nobody should be asked about."""
_NONE: Final = len(NAMES) - 1
PAPER: Final = 240
"""From here on in all three channels a pixel is the white canvas."""
MIN_COVER: Final = 0.04
"""A drawing that covers less of the canvas has no colour to speak of."""
MAIN_SHARE: Final = 0.55
"""The main colour covers at least so much of the drawing, and the second at most half as much."""


def colour_shares(image: Image.Image) -> dict[str, float]:
    """Share of the drawing (what is not white) by colour name; empty for a drawing that is hardly there."""
    rgb = np.asarray(image.convert("RGB"))
    drawn = rgb.min(axis=2) < PAPER
    if drawn.mean() < MIN_COVER:
        return {}
    hsv = np.asarray(image.convert("HSV"))[drawn]
    counts = np.bincount(_named(hsv), minlength=len(NAMES)) / len(hsv)
    return {name: float(share) for name, share in zip(NAMES, counts, strict=True) if name and share > 0}


def main_colour(shares: dict[str, float]) -> str:
    """The colour that anybody would name first, or empty where that is not clear."""
    order = sorted(shares, key=lambda name: (-shares[name], name))
    if not order or shares[order[0]] < MAIN_SHARE:
        return ""
    second = shares[order[1]] if len(order) > 1 else 0.0
    return order[0] if second <= shares[order[0]] / 2 else ""


def _named(hsv: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Index into `NAMES` of each pixel; `hsv` is ``[n, 3]``, all channels up to 255."""
    hue = hsv[:, 0].astype(np.float32) * (360 / 255)
    saturation, value = hsv[:, 1] / 255, hsv[:, 2] / 255
    index_of = NAMES.index
    warm = (hue < 14) | (hue >= 344)
    rules = [
        ((value < 0.22) | ((value < 0.33) & (saturation < 0.35)), index_of("black")),
        ((saturation < 0.13) & (value < 0.85), index_of("grey")),
        (saturation < 0.2, _NONE),
        (warm & (saturation < 0.55) & (value > 0.75), index_of("pink")),
        (warm & (value < 0.45), index_of("brown")),
        (warm, index_of("red")),
        ((hue < 42) & (value < 0.72), index_of("brown")),
        ((hue < 42) & (saturation < 0.55), _NONE),  # skin
        (hue < 40, index_of("orange")),
        ((hue < 68) & (value < 0.55), index_of("brown")),
        (hue < 68, index_of("yellow")),
        (hue < 165, index_of("green")),
        (hue < 185, _NONE),  # turquoise
        (hue < 255, index_of("blue")),
        (hue < 292, index_of("purple")),
        (value < 0.6, index_of("purple")),
    ]
    return np.select([rule for rule, _ in rules], [name for _, name in rules], default=index_of("pink")).astype(
        np.int64
    )
