"""Unusual and hostile images, and the expected result of each: a colour, or an error.

Accepted images (except the smallest) show :data:`LEFT` on three quarters and :data:`RIGHT` on their right, so that a
wrong, rotated or other frame is detected.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

LEFT, RIGHT = (230, 40, 40), (40, 40, 230)
WIDE, HIGH = 48, 32


@dataclass(frozen=True, slots=True)
class Hostile:
    """``code``: the error; empty if it looks like the plain picture, within ``tolerance``."""

    name: str
    data: bytes
    code: str = ""
    tolerance: int = 2
    same_as_plain: bool = True


def plain(left: tuple[int, ...] = LEFT, right: tuple[int, ...] = RIGHT, mode: str = "RGB") -> Image.Image:
    image = Image.new(mode, (WIDE, HIGH), left)
    image.paste(right, (WIDE * 3 // 4, 0, WIDE, HIGH))
    return image


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, depth: int, colour: int, raw: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of given parts; ``raw`` are its rows, each after its filter byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to show
    return encode(plain().transpose(Image.Transpose.ROTATE_90), "JPEG", quality=98, subsampling=0, exif=exif)


def _many_scans(scans: int) -> bytes:
    """A progressive JPEG whose last scan, of a few bytes, is repeated."""
    whole = encode(plain(), "JPEG", quality=98, subsampling=0, progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * (scans - 10) + whole[-2:]


def _segment(kind: int, body: bytes) -> bytes:
    return b"\xff" + bytes([kind]) + struct.pack(">H", len(body) + 2) + body


def _with_segments(segments: bytes) -> bytes:
    whole = encode(plain(), "JPEG", quality=98, subsampling=0)
    return whole[:2] + segments + whole[2:]


def _looping_exif() -> bytes:
    """A directory that is its own successor and claims 65,535 entries of 4 GiB."""
    entry = struct.pack("<HHII", 0x8769, 4, 0xFFFFFFFF, 8)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 0xFFFF) + entry * 5000 + struct.pack("<I", 8)


def _deep(colour: int, pixels: np.ndarray) -> bytes:
    rows = (pixels.astype(np.uint16) * 257).astype(">u2").reshape(HIGH, -1)
    return png(WIDE, HIGH, 16, colour, b"".join(b"\0" + row.tobytes() for row in rows))


def _clear_palette() -> bytes:
    image = plain((0,), (1,), "P")
    image.putpalette([*LEFT, *RIGHT, 0, 255, 0])
    image.paste(2, (0, 0, 4, 4))
    return encode(image, transparency=b"\xff\xff\x00")


def _animated(kind: str, frames: int = 3, **options: Any) -> bytes:
    others = [Image.new("RGB", (WIDE, HIGH), (0, 255, i % 2)) for i in range(frames - 1)]
    return encode(plain(), kind, save_all=True, append_images=others, **options)


def _wide_gif() -> bytes:
    """A canvas of one pixel with a frame of 60,000 x 60,000."""
    frame = b"," + struct.pack("<HHHH", 0, 0, 60_000, 60_000) + b"\0" + b"\x02\x02\x4c\x01\0;"
    return b"GIF89a" + struct.pack("<HH", 1, 1) + b"\x80\0\0" + b"\0" * 6 + frame


PLAIN = encode(plain())
CMYK = encode(plain(), "JPEG", quality=98, subsampling=0)
ROW = b"\0" + bytes(LEFT)

TAKEN = [
    Hostile("polyglot: zip and a page behind a PNG", PLAIN + b"PK\x03\x04<html><script>alert(1)</script>"),
    Hostile("polyglot: a script behind a GIF", encode(plain(), "GIF") + b"*/=1;alert(1)//"),
    Hostile("animated GIF", _animated("GIF")),
    Hostile("animated WebP", _animated("WEBP", lossless=True)),
    Hostile("APNG", _animated("PNG")),
    Hostile("CMYK JPEG", encode(plain().convert("CMYK"), "JPEG", quality=98, subsampling=0), tolerance=12),
    Hostile("EXIF-rotated JPEG", _rotated(), tolerance=12),
    Hostile("progressive JPEG of 60 scans", _many_scans(60), tolerance=12),
    Hostile("EXIF that loops", _with_segments(_segment(0xE1, _looping_exif())), tolerance=12),
    Hostile("scans inside of a comment", _with_segments(_segment(0xFE, b"\xff\xda" * 5000)), tolerance=12),
    Hostile("colour profile of 255 damaged parts", _with_segments(b"".join(
        _segment(0xE2, b"ICC_PROFILE\0" + bytes([i, 255]) + b"x" * 2000) for i in range(1, 256))), tolerance=12),
    Hostile("4 MiB of EXIF in a PNG", png(WIDE, HIGH, 8, 2, b"".join(
        b"\0" + row.tobytes() for row in np.asarray(plain())), (b"eXIf", b"II*\0\x08\0\0\0" + b"\xff" * (4 << 20)))),
    Hostile("animation of 1,000 frames", _animated("GIF", frames=1000)),
    Hostile("16-bit RGB PNG", _deep(2, np.asarray(plain()))),
    Hostile("16-bit RGBA PNG", _deep(6, np.asarray(plain().convert("RGBA")))),
    Hostile("palette", encode(plain().quantize(2))),
    Hostile("bomb inside of the pixels", png(WIDE, HIGH, 8, 2, b"".join(
        b"\0" + row.tobytes() for row in np.asarray(plain())) + b"\0" * 50_000_000)),
    Hostile("1x1", png(1, 1, 8, 2, ROW), same_as_plain=False),
    Hostile("1 pixel high", png(40, 1, 8, 2, b"\0" + bytes(LEFT) * 40), same_as_plain=False),
    Hostile("1 pixel wide", png(1, 40, 8, 2, ROW * 40), same_as_plain=False),
    Hostile("3 pixels high", png(40, 3, 8, 2, (b"\0" + bytes(LEFT) * 40) * 3), same_as_plain=False),
    Hostile("a thread of 100,000 pixels", encode(Image.new("RGB", (100_000, 1), LEFT)), same_as_plain=False),
    Hostile("palette with alpha", _clear_palette(), same_as_plain=False),
    Hostile("16-bit grey PNG", encode(Image.fromarray(np.full((8, 8), 0x8012, np.uint16))), same_as_plain=False),
]  # fmt: skip

REFUSED = [
    Hostile("zero bytes", b"", "image_missing"),
    Hostile("20,000 x 20,000", encode(Image.new("1", (20_000, 20_000))), "image_too_many_pixels"),
    Hostile("claims 30,000 x 30,000", png(30_000, 30_000, 8, 2, b"\0" * 1000), "image_too_many_pixels"),
    Hostile("a GIF whose frame is larger than itself", _wide_gif(), "image_too_many_pixels"),
    Hostile("bomb in a text chunk", png(1, 1, 8, 2, ROW, (b"zTXt", b"a\0\0" + zlib.compress(b"x" * 50_000_000))),
            "image_undecodable"),
    Hostile("bomb in a colour profile", png(1, 1, 8, 2, ROW, (b"iCCP", b"a\0\0" + zlib.compress(b"x" * 50_000_000))),
            "image_undecodable"),
    Hostile("truncated PNG", PLAIN[:60], "image_undecodable"),
    Hostile("truncated JPEG", CMYK[: len(CMYK) // 2], "image_undecodable"),
    Hostile("progressive JPEG of 100 scans", _many_scans(100), "image_undecodable"),
    Hostile("JPEG of 10,000 segments", _with_segments(_segment(0xFE, b"") * 10_000), "image_undecodable"),
    Hostile("polyglot: a GIF that is a script", b"GIF89a/*" + b"\0" * 20 + b"*/=1;alert(1)", "image_undecodable"),
    Hostile("SVG", b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "image_format"),
    Hostile("SVG with a declaration", b"<?xml version='1.0'?><svg/>", "image_format"),
    Hostile("16-bit TIFF", encode(Image.fromarray(np.full((8, 8), 40_000, np.uint16)), "TIFF"), "image_format"),
    Hostile("PDF", b"%PDF-1.7\n", "image_format"),
    Hostile("a page", b"<!doctype html><img src=x onerror=alert(1)>", "image_format"),
]  # fmt: skip
