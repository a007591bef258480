"""Bounded decoding of images from outside; producers, ingest and serving use the same.

What an image claims about itself is checked before anything is decoded: the format by its first bytes, the size by its
header. Only formats with a decoder that Pillow carries are taken; vector formats (SVG) are programs, and are not.

Reasons of the :class:`~ratchet_client.errors.RecordError` raised here: ``image_missing``, ``image_too_large`` (bytes),
``image_too_many_pixels``, ``image_too_small``, ``image_format``, ``image_undecodable``.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Final

from PIL import Image, ImageOps, UnidentifiedImageError

from ratchet_client.errors import RecordError
from ratchet_client.records import DEFAULT_LIMITS

MAX_BYTES = DEFAULT_LIMITS.max_image_bytes
MAX_PIXELS = DEFAULT_LIMITS.max_pixels
BAND_PIXELS = 50_000
"""Pixels whose transparency is resolved at once: half a millisecond. They stay in the processor's cache: ten times as
many took twice as long for the same image."""
MAX_SCANS: Final = 64
"""Encoders write about 10."""
MAX_SEGMENTS: Final = 4096
"""An ICC profile or XMP comes in up to 255 of them."""
_MARKER: Final = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""Not the bytes that stand for 255 in a scan (FF 00), and not its restart markers (D0 to D7)."""
_START_OF_SCAN, _END_OF_IMAGE, _WITHOUT_LENGTH = 0xDA, 0xD9, (0x01, 0xD8)

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


Needed = Callable[[tuple[int, int]], tuple[int, int]]
"""The least size (width, height) that a caller can use of an image of that size."""


@dataclass(frozen=True, slots=True, eq=False)
class OpenedImage:
    """An image whose header was read and is within bounds; none of its pixels is decoded yet."""

    kind: str
    """A key of :data:`CONTENT_TYPES`."""
    image: Image.Image

    @property
    def size(self) -> tuple[int, int]:
        """Width and height by the header, in pixels."""
        return self.image.size

    def decode(self, needed: Needed | None = None) -> Image.Image:
        """The first frame as 8-bit RGB, upright, transparency laid on white. May be called once.

        Args:
            needed: with it a JPEG is decoded at a half, a quarter or an eighth of its size, by the scaled inverse DCT
                of libjpeg, where at least the size that this returns remains. Other formats are decoded whole.

        Raises:
            RecordError: ``image_undecodable``.
        """
        with _as_record_errors(self.kind):
            drafted = self.image.draft(None, needed(self.image.size)) if needed and self.kind == "JPEG" else None
            self.image.load()
            return _upright_rgb(self.image if drafted is None else _without_padding(self.image, drafted[1]))


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
    return open_image(data, max_pixels, max_bytes, min_side).decode()


def open_image(data: bytes, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES, min_side: int = 1) -> OpenedImage:
    """Read an image's header and check it; see :func:`decode_image` for arguments and errors."""
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
            f"the image begins with {data[:8]!r}, which is not a format that is taken.",
            f"Send one of {', '.join(CONTENT_TYPES)}.",
        )
    if kind == "JPEG" and has_too_many_scans(data):
        raise RecordError(
            "image_undecodable",
            f"the JPEG has more than {MAX_SCANS} scans or {MAX_SEGMENTS} segments.",
            "Save it again, baseline or progressive.",
        )
    with _as_record_errors(kind):
        image = Image.open(BytesIO(data), formats=[kind])
        _check_size(image.size, max_pixels, min_side)
        return OpenedImage(kind, image)


def has_too_many_scans(data: bytes) -> bool:
    """True for a JPEG with more than :data:`MAX_SCANS` scans, or :data:`MAX_SEGMENTS` segments, up to its end.

    These bound work that the number of pixels does not show: a progressive JPEG may send its coefficients in any number
    of scans, and a scan of 31 bytes costs a pass over all of the picture (9 ms for 16 million pixels). In 8 MiB there
    is room for 40 minutes of decoding.
    """
    position, scans, segments = 2, 0, 0
    while marker := _MARKER.search(data, position):
        kind, position = data[marker.start() + 1], marker.end()
        if kind == _END_OF_IMAGE:
            return False
        if kind not in _WITHOUT_LENGTH:
            position += int.from_bytes(data[position : position + 2])
        segments += 1
        scans += kind == _START_OF_SCAN
        if scans > MAX_SCANS or segments > MAX_SEGMENTS:
            return True
    return False


def open_accepted(data: bytes) -> OpenedImage:
    """Open an image that was accepted before, by the limits of its time: they may have been wider than any of today.

    Raises:
        RecordError: it is not an image.
    """
    return open_image(data, max_pixels=sys.maxsize, max_bytes=sys.maxsize)


@contextlib.contextmanager
def _as_record_errors(kind: str) -> Iterator[None]:
    """Raise Pillow's errors as :class:`~ratchet_client.errors.RecordError`."""
    try:
        yield
    except RecordError:
        raise
    except Image.DecompressionBombError:
        raise RecordError("image_too_many_pixels", "the image has too many pixels.", "Scale it down.") from None
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


def _without_padding(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """A JPEG that was decoded at a scale: its last pixel is padded where a side is not a multiple of it.

    Left there, a picture of 641 columns would be stretched to 644.
    """
    width, height = max(1, round(box[2])), max(1, round(box[3]))
    if (width, height) == (box[2], box[3]):
        return image
    resized = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    resized.info = image.info  # says how it is to be turned
    return resized


def _upright_rgb(image: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # damaged EXIF says nothing about the pixels
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in _DEEP_MODES:
        return _to_8_bit(image, image.info.get("transparency")).convert("RGB")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    def lay(band: Image.Image) -> Image.Image:
        clear = band.convert("RGBA")
        white = Image.new("RGBA", clear.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, clear).convert("RGB")

    return _in_bands(image, "RGB", BAND_PIXELS, lay)


def _to_8_bit(image: Image.Image, transparent: object) -> Image.Image:
    """Pillow clips deep grey images at 255 when it converts them; keep the upper 8 of 16 bits instead."""
    upper = [value >> 8 for value in range(1 << 16)]
    if isinstance(transparent, int):  # one of the 65,536 greys
        upper[transparent] = 255
    return _in_bands(image, "L", 4 * BAND_PIXELS, lambda band: band.convert("I").point(upper, "L"))


def _in_bands(image: Image.Image, mode: str, pixels: int, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert an image in bands of rows: Pillow does this under Python's lock, and needs up to three whole copies.

    A large image would stop every other thread for half a second, and take 600 MB.
    """
    result = Image.new(mode, image.size, None)  # the bands fill it: to write zeros first takes the lock for 50 ms
    width, height = image.size
    rows = max(1, pixels // width)
    for top in range(0, height, rows):
        result.paste(convert(image.crop((0, top, width, min(top + rows, height)))), (0, top))
    return result
