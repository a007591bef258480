"""Converts any picture to one format: 128 px square, RGB on white, PNG or JPEG."""

from __future__ import annotations

import io
import re
from typing import Final

import resvg_py
from PIL import Image

SIDE: Final = 128
MAX_PIXELS: Final = 20_000_000
"""Larger source pictures are skipped; some of openclipart's exceed 100 megapixels."""
DPI: Final = 96.0
"""CSS's value, for SVG lengths in cm or pt. resvg draws nothing without one."""
MAX_DRAWN: Final = 1024
"""Maximum width of a drawn SVG, to enlarge small content."""
MAX_SVG_BYTES: Final = 4 * 2**20
_OUTSIDE: Final = re.compile(rb"""(<image\b[^>]*?)\s[\w:]*href\s*=\s*(?:"(?!#|data:)[^"]*"|'(?!#|data:)[^']*')""")
"""A bitmap by path or URL: a file of the artist's machine, often a tracing aid. Must never be looked up here."""


class Unfit(Exception):
    """A source picture that is not used, with the reason."""


def decode(data: bytes) -> Image.Image:
    """Decode a PNG, WebP or JPEG picture. Raises `Unfit`."""
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "WEBP", "JPEG"))
        if image.width * image.height > MAX_PIXELS:
            raise Unfit("over the pixel limit")
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unfit("not a readable picture") from error
    return image


def draw_svg(data: bytes, trim: bool = False) -> Image.Image:
    """Draw an SVG `SIDE` wide (`trim`: only its content), without fonts or files of the machine. Raises `Unfit`."""
    if len(data) > MAX_SVG_BYTES:
        raise Unfit("SVG over the size limit")
    data = _OUTSIDE.sub(rb"\1", data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    image = _drawn(text, SIDE)
    box = image.getchannel("A").getbbox() if trim else None
    if box is None:
        return image
    content = max(box[2] - box[0], box[3] - box[1])
    if content < 0.75 * SIDE:
        image = _drawn(text, min(MAX_DRAWN, image.width * SIDE // content))
        box = image.getchannel("A").getbbox()
    return image.crop(box)


def _drawn(text: str, width: int) -> Image.Image:
    try:
        # Given one side, resvg keeps the aspect ratio; a tall picture becomes larger than needed.
        png = resvg_py.svg_to_bytes(text, width=width, dpi=DPI, skip_system_fonts=True)
        return decode(png).convert("RGBA")
    except ValueError as error:
        raise Unfit("not a drawable SVG") from error


def on_canvas(image: Image.Image, crisp: bool = False) -> Image.Image:
    """`image` scaled to fit a white `SIDE` square; `crisp` keeps the edges of pixel art. Raises `Unfit` if blank."""
    image = image.convert("RGBA")
    if image.getchannel("A").getbbox() is None:
        raise Unfit("blank")
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
