"""Bounded decoding of images from outside; ingest and serving use the same.

What an image claims about itself is checked before anything is decoded: the format by its first bytes, the size by its
header. Only formats with a decoder that Pillow carries are taken; vector formats (SVG) are programs, and are not.

Reasons of the :class:`~ops.errors.RecordError` raised here: ``image_missing``, ``image_too_large`` (bytes),
``image_too_many_pixels``, ``image_too_small``, ``image_format``, ``image_undecodable``.
"""

from __future__ import annotations

import contextlib
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ops.errors import RecordError
from streams.jpeg_scans import MAX_SCANS, MAX_SEGMENTS, has_too_many_scans

MIB = 1024 * 1024
MAX_BYTES = 8 * MIB
MAX_PIXELS = 40_000_000
BAND_PIXELS = 500_000
"""Pixels whose transparency is resolved at once: a few milliseconds."""

#: Content type by format, as :func:`sniff` names formats.
CONTENT_TYPES = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
}
_ALPHA_MODES = {"RGBA", "LA", "PA", "La", "RGBa"}
_DEEP_MODES = {"I;16", "I;16B", "I;16L", "I;16N", "I"}


def sniff(data: bytes) -> str | None:
    """Format of an image by its first bytes (a key of :data:`CONTENT_TYPES`), or None if it is none that is taken."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    # A BMP begins with two letters only, so its header size is looked at as well (12 to 124 bytes, little-endian).
    if data[:2] == b"BM" and len(data) > 18 and data[14] in (12, 40, 52, 56, 64, 108, 124) and data[15] == 0:
        return "BMP"
    return None


def decode_image(
    data: bytes, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES, min_side: int = 1
) -> Image.Image:
    """Decode the first frame to 8-bit RGB, upright, transparency laid on white.

    Args:
        data: the encoded image, PNG, JPEG, WebP, GIF or BMP.
        max_pixels: most pixels (width times height), checked on the header before decoding.
        max_bytes: most encoded bytes.
        min_side: shortest side in pixels.

    Raises:
        RecordError: with one of the reasons in the module's docstring.
    """
    if not data:
        raise RecordError("image_missing", "the image is empty.", "Send the bytes of an image file.")
    if len(data) > max_bytes:
        raise RecordError(
            "image_too_large",
            f"the image has {len(data)} bytes, more than {max_bytes}.",
            "Scale it down or compress it.",
        )
    kind = sniff(data)
    if kind is None:
        raise RecordError(
            "image_format",
            f"the image begins with {data[:8]!r}, which is no format that is taken.",
            f"Send one of {', '.join(CONTENT_TYPES)}.",
        )
    if kind == "JPEG" and has_too_many_scans(data):
        raise RecordError(
            "image_undecodable",
            f"the JPEG has more than {MAX_SCANS} scans or {MAX_SEGMENTS} segments.",
            "Save it again, baseline or progressive.",
        )
    try:
        with Image.open(BytesIO(data), formats=[kind]) as image:
            _check_size(image.size, max_pixels, min_side)
            image.load()
            return _upright_rgb(image)
    except RecordError:
        raise
    except Image.DecompressionBombError:
        raise RecordError(
            "image_too_many_pixels", f"the image has more than {max_pixels} pixels.", "Scale it down."
        ) from None
    except UnidentifiedImageError:  # its message holds the address of a Python object, and nothing more
        raise RecordError(
            "image_undecodable", f"the {kind} image has no header that can be read.", "Check that the file is whole."
        ) from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise RecordError(
            "image_undecodable",
            f"the {kind} image cannot be decoded: {str(error)[:200] or type(error).__name__}.",
            "Check that the file is whole.",
        ) from error


def _check_size(size: tuple[int, int], max_pixels: int, min_side: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise RecordError(
            "image_too_many_pixels",
            f"the image is {width}x{height}, more than {max_pixels} pixels.",
            "Scale it down.",
        )
    if min(width, height) < min_side:
        raise RecordError(
            "image_too_small",
            f"the image is {width}x{height}; its shorter side must be at least {min_side} pixels.",
            "Send a larger one.",
        )


def _upright_rgb(image: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # damaged EXIF says nothing about the pixels
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in _DEEP_MODES:
        return Image.fromarray(_to_8_bit(image, image.info.get("transparency"))).convert("RGB")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """Transparency laid on white, in bands of rows: Pillow does this under Python's lock, and needs three whole copies.

    A large image would stop every other thread for half a second, and take 600 MB.
    """
    result = Image.new("RGB", image.size)
    width, height = image.size
    rows = max(1, BAND_PIXELS // width)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(top + rows, height))).convert("RGBA")
        white = Image.new("RGBA", band.size, (255, 255, 255, 255))
        result.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
    return result


def _to_8_bit(image: Image.Image, transparent: object) -> np.ndarray:
    """Pillow clips deep grey images at 255 when it converts them; keep the upper 8 of 16 bits instead."""
    values = np.asarray(image)
    if values.dtype != np.uint16:
        values = np.clip(values, 0, 65535).astype(np.uint16)
    grey = (values >> 8).astype(np.uint8)
    if isinstance(transparent, int):  # one of the 65,536 greys
        grey[values == transparent] = 255
    return grey
