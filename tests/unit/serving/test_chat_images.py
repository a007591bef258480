"""What a VLM gets to see of an image that a client sent."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from core.settings.serving import Serve
from serving.engines.preprocess import Preprocess
from serving.engines.vlm.generation import MAX_IMAGES
from serving.http.image_loader import ImageLoader, fitted
from tests.unit.serving.scripted_vlms import (
    SETTINGS,
    ScriptedVlms,
    Visitor,
    about_image,
    app_of,
    app_state,
    client,
    png,
    uri,
)


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
    async with image_loader.pictures([("a", uri(red)), ("b", blue), ("c", red)]) as made:
        pass
    assert [image.shape for image in made] == [(3, 5, 3), (7, 2, 3), (3, 5, 3)]
    assert (made[0] == made[2]).all()
    assert (made[1] == np.array([0, 0, 255], np.uint8)).all()


async def test_grey_and_transparent_images_become_rgb_on_white() -> None:
    buffers = [io.BytesIO(), io.BytesIO()]
    Image.new("L", (4, 4), 100).save(buffers[0], "PNG")
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(buffers[1], "PNG")
    image_loader = ImageLoader(Preprocess(size=16), SETTINGS)
    files = [("a", buffers[0].getvalue()), ("b", buffers[1].getvalue())]
    async with image_loader.pictures(files) as (grey, clear):
        pass
    assert (grey == 100).all() and grey.shape == (4, 4, 3)
    assert (clear == 255).all()


async def test_more_images_than_a_vlm_takes_are_refused_before_one_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageLoader, "inspect", None)
    at = app_state(ScriptedVlms())
    shown = about_image()[0]["content"][0]
    messages = [{"role": "user", "content": [shown] * 3}, {"role": "user", "content": [shown] * (MAX_IMAGES - 2)}]
    async with client(at) as http:
        answer = await http.post("/v1/chat/completions", json={"messages": messages})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "too_many_images", "messages")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": about_image()}),
        ("/v1/chat/completions", {"messages": about_image(), "stream": True}),
        ("/v1/vqa", {"image": uri(), "question": "what is this?"}),
    ],
)
async def test_pictures_count_until_the_vlm_has_answered(path: str, body: dict[str, Any]) -> None:
    vlms = ScriptedVlms(hangs_at=1)
    at = app_state(vlms)
    visitor = Visitor(app_of(at), path, json.dumps(body).encode())
    asked = visitor.start()
    await asyncio.wait_for(vlms.waiting.wait(), 30)
    assert at.image_loader.queue.pixels == 6 * 4
    visitor.gone.set()
    await asyncio.wait([asked], timeout=30)
    assert at.image_loader.queue.pixels == 0
    async with client(at) as http:
        vlms.hangs_at = None
        assert (await http.post(path, json=body)).status_code == 200
    assert at.image_loader.queue.pixels == 0


async def test_a_large_picture_counts_as_large_as_it_is_kept() -> None:
    bounds = Serve(max_pixels=1_000_000, decode_pixels=4_000_000)
    image_loader = ImageLoader(Preprocess(size=16), bounds)
    pictures = [(f"messages.0.content.{number}", png(1000, 1000)) for number in range(2)]
    async with image_loader.pictures(pictures, "a") as made:
        kept = sum(picture.shape[0] * picture.shape[1] for picture in made)
        assert kept <= bounds.max_pixels < 2_000_000
        assert image_loader.queue.pixels == kept
    assert image_loader.queue.pixels == 0


async def test_small_images_count_as_large_as_a_clip_looks_at_them() -> None:
    image_loader = ImageLoader(Preprocess(size=16), SETTINGS)
    images = await image_loader.inspect([("a", png()), ("b", png())])
    async with image_loader.decoded(images, "a") as pixels:
        assert pixels.shape == (2, 16, 16, 3)
        assert image_loader.queue.pixels == 2 * 16 * 16
    assert image_loader.queue.pixels == 0
