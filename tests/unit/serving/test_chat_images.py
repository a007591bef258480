"""What a VLM gets to see of an image that a client sent."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from serving.engines.preprocess import Preprocess
from serving.http.errors import ApiError
from serving.http.image_loader import ImageLoader, fitted
from tests.unit.serving.scripted_vlms import SETTINGS, png, uri


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 50_000), st.integers(1, 200))
def test_a_fitted_image_keeps_its_bounds_and_its_shape(width: int, height: int, most: int, longest: int) -> None:
    made = fitted(Image.new("RGB", (width, height)), most, longest)
    high, wide, channels = made.shape
    assert channels == 3 and made.dtype == np.uint8
    assert 1 <= max(wide, high) <= longest
    assert wide * high <= most or min(wide, high) == 1
    if max(width, height) <= longest and width * height <= most:
        assert (wide, high) == (width, height)
    else:
        scale = max(wide, high) / max(width, height)
        assert abs(wide - width * scale) <= 1 and abs(high - height * scale) <= 1


async def test_data_uris_and_uploads_are_the_same_pixels_in_their_order() -> None:
    image_loader = ImageLoader(Preprocess(size=16), SETTINGS)
    red, blue = png(5, 3, (255, 0, 0)), png(2, 7, (0, 0, 255))
    made = await image_loader.pictures([("a", uri(red)), ("b", blue), ("c", red)])
    assert [image.shape for image in made] == [(3, 5, 3), (7, 2, 3), (3, 5, 3)]
    assert (made[0] == made[2]).all()
    assert (made[1] == np.array([0, 0, 255], np.uint8)).all()


async def test_grey_and_transparent_images_become_rgb_on_white() -> None:
    buffers = [io.BytesIO(), io.BytesIO()]
    Image.new("L", (4, 4), 100).save(buffers[0], "PNG")
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(buffers[1], "PNG")
    image_loader = ImageLoader(Preprocess(size=16), SETTINGS)
    grey, clear = await image_loader.pictures([("a", buffers[0].getvalue()), ("b", buffers[1].getvalue())])
    assert (grey == 100).all() and grey.shape == (4, 4, 3)
    assert (clear == 255).all()


async def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    image_loader = ImageLoader(Preprocess(size=16), SETTINGS)
    with pytest.raises(ApiError) as caught:
        await image_loader.pictures([("image", png(1001, 1000))])
    assert (caught.value.status_code, caught.value.param) == (413, "image")
