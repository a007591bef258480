"""Pictures of any kind, brought to one: 128 px square, RGB on white, PNG or JPEG."""

from __future__ import annotations

import io
import re
from typing import Final

import resvg_py
from PIL import Image

SIDE: Final = 128
MAX_PIXELS: Final = 20_000_000
"""A larger source picture is skipped; some of openclipart's exceed 100 megapixels."""
MAX_SVG_BYTES: Final = 4 * 2**20
_OUTSIDE: Final = re.compile(rb"<image[^>]*href\s*=\s*[\"'](?!#|data:)")


class Unfit(Exception):
    """A source picture that is not used, with the reason."""


def decode(data: bytes) -> Image.Image:
    """A PNG or WebP picture. Raises `Unfit`."""
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "WEBP", "JPEG"))
        if image.width * image.height > MAX_PIXELS:
            raise Unfit("over the pixel limit")
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unfit("not a readable picture") from error
    return image


def draw_svg(data: bytes) -> Image.Image:
    """An SVG, drawn so that its longer side is `SIDE`. Fonts of the machine are not used. Raises `Unfit`."""
    if len(data) > MAX_SVG_BYTES:
        raise Unfit("SVG over the size limit")
    if _OUTSIDE.search(data):
        raise Unfit("SVG refers to a file outside")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    try:
        # Given one side alone, resvg keeps the aspect ratio.
        image = Image.open(io.BytesIO(resvg_py.svg_to_bytes(text, width=SIDE, skip_system_fonts=True)))
        if image.height > SIDE:
            image = Image.open(io.BytesIO(resvg_py.svg_to_bytes(text, height=SIDE, skip_system_fonts=True)))
        image.load()
    except (ValueError, OSError, Image.DecompressionBombError) as error:
        raise Unfit("not a drawable SVG") from error
    return image


def on_canvas(image: Image.Image, crisp: bool = False) -> Image.Image:
    """`image` scaled to fit a white `SIDE` square, centred. `crisp` keeps the edges of pixel art."""
    image = image.convert("RGBA")
    scale = SIDE / max(image.size)
    if crisp and scale > 1:
        scale = int(scale)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if size != image.size:
        # Premultiplied, or transparent pixels bleed their hidden colour into the edges.
        method = Image.Resampling.NEAREST if crisp and scale >= 1 else Image.Resampling.BICUBIC
        reducing = 3.0 if method is Image.Resampling.BICUBIC else None
        image = image.convert("RGBa").resize(size, method, reducing_gap=reducing).convert("RGBA")
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste(image, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2), image)
    return canvas


def encode(image: Image.Image, suffix: str) -> bytes:
    """PNG, or JPEG of quality 90 for `suffix` "jpg"."""
    buffer = io.BytesIO()
    if suffix == "jpg":
        image.save(buffer, "JPEG", quality=90)
    else:
        image.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()
