"""JPEGs decoded at the scale that is needed: what remains, and how close the pixels are to a whole decode."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ratchet_client.images import decode_image, open_image
from serving.engines.preprocess import Preprocess, ResizeMode


def photo(width: int, height: int, kind: str = "JPEG", **options: object) -> bytes:
    """Waves of several lengths, and an edge: neither flat nor noise."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    waves = [np.sin(x / 7 + y / 29), np.sin(y / 11), np.where(x > width / 3, 1.0, -1.0) * np.cos(y / 50)]
    buffer = io.BytesIO()
    Image.fromarray((np.stack(waves, axis=2) * 100 + 128).astype(np.uint8)).save(buffer, kind, **options)
    return buffer.getvalue()


def scaled(preprocess: Preprocess, data: bytes) -> Image.Image:
    return open_image(data).decode(preprocess.needed)


@pytest.mark.parametrize(
    ("size", "decoded"),
    [((640, 480), (320, 240)), ((480, 1920), (240, 960)), ((2001, 1800), (250, 225)), ((447, 900), (447, 900)),
     ((449, 448), (224, 224)), ((100, 100), (100, 100))],
)  # fmt: skip
def test_a_jpeg_keeps_at_least_the_size_that_is_needed(size: tuple[int, int], decoded: tuple[int, int]) -> None:
    assert scaled(Preprocess(size=224), photo(*size)).size == decoded


def test_other_formats_are_decoded_whole() -> None:
    for kind in ("PNG", "WEBP", "BMP", "GIF"):
        assert scaled(Preprocess(size=16), photo(160, 120, kind)).size == (160, 120)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(640, 480), (641, 481), (300, 1200), (2000, 1500), (1795, 1601)])
def test_the_pixels_stay_close_to_those_of_a_whole_decode(mode: ResizeMode, size: tuple[int, int]) -> None:
    preprocess, data = Preprocess(size=112, resize_mode=mode), photo(*size, quality=90)
    ours, whole = (preprocess.pixels(image).astype(int) for image in (data, decode_image(data)))
    assert ours.shape == whole.shape
    assert np.abs(ours - whole).mean() < 2


def test_a_turned_jpeg_is_upright_at_any_scale() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # its rows are columns
    data = photo(640, 320, exif=exif)
    preprocess = Preprocess(size=64)
    assert scaled(preprocess, data).size == (80, 160)
    turned = preprocess.pixels(decode_image(data)).astype(int)
    assert np.abs(preprocess.pixels(data).astype(int) - turned).mean() < 2


def test_a_cmyk_jpeg_and_a_grey_one_are_scaled_too() -> None:
    for mode in ("CMYK", "L"):
        buffer = io.BytesIO()
        with Image.open(io.BytesIO(photo(320, 240))) as image:
            image.convert(mode).save(buffer, "JPEG")
        decoded = scaled(Preprocess(size=64), buffer.getvalue())
        assert (decoded.mode, decoded.size) == ("RGB", (160, 120))
