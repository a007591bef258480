"""Images from outside are decoded within bounds, and look as they were meant to."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from core.errors import RecordError
from ratchet_client.images import decode_image, sniff
from tests.support.hostile_images import png_chunk

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP"]


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def solid(mode: str, size: tuple[int, int], color: Any) -> Image.Image:
    return Image.new(mode, size, color)


def reason(data: bytes, **bounds: int) -> str:
    with pytest.raises(RecordError) as caught:
        decode_image(data, **bounds)
    return str(caught.value.reason)


def png_that_claims(width: int, height: int) -> bytes:
    """A few bytes of PNG whose header claims any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + png_chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", FORMATS)
def test_each_allowed_format_is_recognised_and_decoded(kind: str) -> None:
    data = encode(solid("RGB", (40, 20), (200, 30, 60)), kind)
    image = decode_image(data)
    assert sniff(data) == kind
    assert (image.mode, image.size) == ("RGB", (40, 20))
    assert np.abs(np.asarray(image, np.int16) - (200, 30, 60)).max() < 12


@pytest.mark.parametrize(
    "data",
    [
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        b"<?xml version='1.0'?><svg/>",
        b"%PDF-1.7",
        b"II*\0" + b"\0" * 64,
        b"BM is how this sentence begins",
        b"GIF88a" + b"\0" * 32,
        b"just some text",
    ],
)
def test_other_formats_are_refused_by_their_first_bytes(data: bytes) -> None:
    assert sniff(data) is None
    assert reason(data) == "image_format"


def test_empty_is_missing() -> None:
    assert reason(b"") == "image_missing"


def test_too_many_bytes_are_refused() -> None:
    assert reason(encode(solid("RGB", (64, 64), 0)), max_bytes=50) == "image_too_large"


@pytest.mark.parametrize("size", [(30_000, 30_000), (2**31 - 1, 2**31 - 1), (50_000_000, 1)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("the bomb was decoded"), raising=True)
    assert reason(png_that_claims(*size)) == "image_too_many_pixels"


def test_a_short_side_is_refused() -> None:
    data = encode(solid("RGB", (64, 4), 0))
    assert reason(data, min_side=8) == "image_too_small"
    assert decode_image(data, min_side=4).size == (64, 4)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_image_is_refused(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    data = encode(Image.fromarray(noise), kind)
    assert reason(data[: len(data) // 2]) == "image_undecodable"


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_exif_rotation_is_applied(kind: str) -> None:
    image = solid("RGB", (40, 20), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 20, 20))  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to show
    turned = decode_image(encode(image, kind, exif=exif))
    assert turned.size == (20, 40)
    assert np.asarray(turned)[:18].mean() > 240  # white is now on top
    assert np.asarray(turned)[22:].mean() < 15


def test_damaged_exif_does_not_matter() -> None:
    data = encode(solid("RGB", (16, 16), 0), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode_image(data).size == (16, 16)


@pytest.mark.parametrize(("mode", "color"), [("RGBA", (255, 0, 0, 0)), ("LA", (0, 0)), ("RGBA", (255, 255, 255, 128))])
def test_transparency_is_laid_on_white(mode: str, color: Any) -> None:
    assert np.asarray(decode_image(encode(solid(mode, (16, 16), color)))).min() >= 254


def test_half_transparent_black_becomes_grey() -> None:
    assert abs(int(np.asarray(decode_image(encode(solid("RGBA", (9, 9), (0, 0, 0, 128)))))[0, 0, 0]) - 127) < 2


def test_a_palette_keeps_its_colours_and_its_transparent_entry_is_white() -> None:
    image = solid("P", (16, 16), 0)
    image.putpalette([10, 200, 30, 250, 0, 0])
    image.paste(1, (8, 0, 16, 16))
    pixels = np.asarray(decode_image(encode(image, "PNG", transparency=1)))
    assert tuple(pixels[0, 0]) == (10, 200, 30)
    assert tuple(pixels[0, 15]) == (255, 255, 255)


def test_sixteen_bit_grey_keeps_its_upper_eight_bits() -> None:
    values = np.array([[0, 0x1234, 0x8000, 0xFFFF]] * 4, np.uint16)
    pixels = np.asarray(decode_image(encode(Image.fromarray(values))))
    assert pixels[0, :, 0].tolist() == [0, 0x12, 0x80, 0xFF]


def test_cmyk_becomes_the_colour_it_means() -> None:
    data = encode(solid("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    red, green, blue = np.asarray(decode_image(data))[8, 8].tolist()
    assert red > 200 and green < 60 and blue < 60


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [solid("RGB", (16, 16), color) for color in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert tuple(np.asarray(decode_image(data))[0, 0]) == (255, 0, 0)


@settings(deadline=None)
@given(st.sampled_from(FORMATS), st.data())
def test_damaged_bytes_either_decode_or_are_refused_with_a_reason(kind: str, data: st.DataObject) -> None:
    whole = bytearray(encode(solid("RGB", (24, 24), (1, 2, 3)), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode_image(bytes(whole), max_pixels=10_000).mode == "RGB"
    except RecordError as error:
        assert error.reason.startswith("image_")
