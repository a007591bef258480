"""Inputs that no cache has seen: every image has other bytes, every text other words.

The pictures are generated: smooth shapes and fine texture, 640x480, about 86 KB as JPEG, like photographs. A picture is
sent repeatedly with another JPEG comment, which changes the digest of its bytes and not its pixels.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 640, 480
PICTURES: Final = 32
QUALITY: Final = 90
TEXTURE: Final = 9.0
"""Standard deviation of the texture, in grey levels: with :data:`QUALITY` it makes JPEGs of about 86 KB."""
COMMENT_DIGITS: Final = 24
"""SOI (2 bytes), marker (2), length (2) and these are 30 bytes, a multiple of 3, so that their base64 can be
concatenated."""
_ADJECTIVES = (
    "red", "blue", "green", "small", "large", "old", "new", "dark", "bright", "wooden", "broken", "round", "tall",
    "young", "quiet", "empty", "wet", "soft", "white", "black",
)  # fmt: skip
_NOUNS = (
    "cat", "dog", "house", "car", "tree", "boat", "bird", "chair", "table", "bridge", "road", "lake", "horse", "bottle",
    "clock", "train", "flower", "window", "river", "hat",
)  # fmt: skip
_PLACES = ("beside", "behind", "under", "above", "near")


@dataclass(frozen=True)
class BodyTemplate:
    """The JSON of a request around its inputs. ``item``: the text before and after each one."""

    before: str
    item: tuple[str, str]
    after: str

    def parts(self, items: Sequence[Sequence[bytes]]) -> list[bytes]:
        """The body in pieces, to be written without being joined. An input is given in pieces, too."""
        opening, closing = (piece.encode() for piece in self.item)
        pieces = [self.before.encode()]
        for number, item in enumerate(items):
            pieces += [b"," + opening if number else opening, *item, closing]
        return [*pieces, self.after.encode()]


class JpegInput:
    """A JPEG as base64, with a comment that is different each time."""

    def __init__(self, jpeg: bytes) -> None:
        self.jpeg = jpeg
        self._rest = base64.b64encode(jpeg[2:])

    def numbered(self, number: int) -> tuple[bytes, bytes]:
        """Base64 in two pieces, the second the same for every number."""
        return base64.b64encode(_start(number)), self._rest


def _start(number: int) -> bytes:
    """SOI and a comment segment (ITU-T T.81, B.2.4.5)."""
    return b"\xff\xd8\xff\xfe" + (COMMENT_DIGITS + 2).to_bytes(2, "big") + b"%0*d" % (COMMENT_DIGITS, number)


def text(number: int) -> str:
    """A text of 10 to 16 tokens; distinct for every number below 8 million."""
    number, first = divmod(number, len(_ADJECTIVES))
    number, second = divmod(number, len(_NOUNS))
    number, third = divmod(number, len(_PLACES))
    number, fourth = divmod(number, len(_ADJECTIVES))
    number, fifth = divmod(number, len(_NOUNS))
    last = f" and {_NOUNS[number % len(_NOUNS)]} number {number}" if number else ""
    return (
        f"a photo of a {_ADJECTIVES[first]} {_NOUNS[second]} {_PLACES[third]} a {_ADJECTIVES[fourth]} "
        f"{_NOUNS[fifth]}{last}"
    )


def text_input(number: int) -> tuple[bytes]:
    return (json.dumps(text(number))[1:-1].encode(),)


def jpegs(count: int = PICTURES) -> list[bytes]:
    random = np.random.default_rng(0)
    return [_jpeg(random) for _ in range(count)]


def _jpeg(random: np.random.Generator) -> bytes:
    colours = random.integers(20, 236, (6, 8, 3), dtype=np.uint8)
    smooth = Image.fromarray(colours).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    fine = random.normal(0.0, TEXTURE, (HEIGHT // 2, WIDTH // 2))
    coarse = random.normal(0.0, 2 * TEXTURE, (HEIGHT // 8, WIDTH // 8))
    texture = sum(
        np.asarray(Image.fromarray(layer.astype(np.float32)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
        for layer in (fine, coarse)
    )
    pixels = np.clip(np.asarray(smooth, dtype=np.float32) + np.asarray(texture)[..., None], 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
