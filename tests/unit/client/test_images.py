from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from core.errors import RecordError
from ratchet_client.images import decode_image, sniff
from tests.support.hostile_images import encode, png

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP"]


def solid(mode: str, size: tuple[int, int], color: Any) -> Image.Image:
    return Image.new(mode, size, color)


def reason(data: bytes, **bounds: int) -> str:
    with pytest.raises(RecordError) as caught:
        decode_image(data, **bounds)
    return str(caught.value.reason)


@pytest.mark.parametrize("kind", FORMATS)
def test_each_allowed_format_is_recognised_and_decoded(kind: str) -> None:
    data = encode(solid("RGB", (40, 20), (200, 30, 60)), kind)
    image = decode_image(data)
    assert sniff(data) == kind
    assert (image.mode, image.size) == ("RGB", (40, 20))
    assert np.abs(np.asarray(image, np.int16) - (200, 30, 60)).max() < 12


@pytest.mark.parametrize("data", [b"II*\0" + b"\0" * 64, b"BM is how this sentence begins", b"GIF88a" + b"\0" * 32])
def test_what_begins_like_an_image_and_is_of_no_format_taken_is_refused(data: bytes) -> None:
    assert sniff(data) is None
    assert reason(data) == "image_format"


@pytest.mark.parametrize("size", [(30_000, 30_000), (2**31 - 1, 2**31 - 1), (50_000_000, 1)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("the bomb was decoded"), raising=True)
    assert reason(png(*size, 8, 2, b"\0" * 1000)) == "image_too_many_pixels"


def test_sizes_are_bounded_in_bytes_and_at_the_short_side() -> None:
    thin = encode(solid("RGB", (64, 4), 0))
    assert reason(thin, max_bytes=50) == "image_too_large"
    assert reason(thin, min_side=8) == "image_too_small"
    assert decode_image(thin, min_side=4).size == (64, 4)


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


@pytest.mark.parametrize(
    ("mode", "color", "grey"),
    [("RGBA", (255, 0, 0, 0), 255), ("LA", (0, 0), 255), ("RGBA", (255, 255, 255, 128), 255),
     ("RGBA", (0, 0, 0, 128), 127)],
)  # fmt: skip
def test_transparency_is_laid_on_white(mode: str, color: Any, grey: int) -> None:
    assert abs(np.asarray(decode_image(encode(solid(mode, (16, 16), color))), np.int16) - grey).max() < 2


def test_sixteen_bit_grey_keeps_its_upper_eight_bits() -> None:
    values = np.array([[0, 0x1234, 0x8000, 0xFFFF]] * 4, np.uint16)
    pixels = np.asarray(decode_image(encode(Image.fromarray(values))))
    assert pixels[0, :, 0].tolist() == [0, 0x12, 0x80, 0xFF]


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
