from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from core.settings.serving import Serve
from ratchet_client.images import OpenedImage, decode_image, open_image
from serving.engines.preprocess import Preprocess
from serving.engines.vlm.generation import MAX_IMAGES
from serving.http.errors import ApiError
from serving.http.image_loader import ImageLoader, ImageSource, decoding_pixels, fitted, jobs_of
from serving.messages import IMAGES_PER_REQUEST
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


def loader(**bounds: int) -> ImageLoader:
    return ImageLoader(Preprocess(size=16), Serve(**bounds))


def jpeg(progressive: bool = False) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG", progressive=progressive)
    return buffer.getvalue()


async def pictures(images: ImageLoader, sources: Sequence[ImageSource]) -> tuple[np.ndarray, ...]:
    async with images.pictures(sources) as made:
        return made


async def test_the_pixels_of_a_request_are_bounded_together_and_nothing_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = loader(max_pixels=10_000)
    picture = png(100, 100)
    assert (await images.pixels([("images.0", picture), ("images.1", picture)])).shape == (2, 16, 16, 3)
    monkeypatch.setattr(OpenedImage, "decode", None)
    for load in (images.pixels, partial(pictures, images)):
        with pytest.raises(ApiError, match="30000 pixels together, more than 20000") as caught:
            await load([(f"images.{n}", picture) for n in range(3)])
        assert (caught.value.status_code, caught.value.code, caught.value.param) == (413, "too_many_pixels", "images")
        assert "2 x serve.max_pixels" in str(caught.value.detail)


async def test_more_images_than_a_request_may_have_are_refused_before_one_is_opened() -> None:
    with pytest.raises(ApiError) as caught:
        await loader().inspect([(f"images.{n}", b"") for n in range(IMAGES_PER_REQUEST + 1)])
    assert (caught.value.status_code, caught.value.code, caught.value.param) == (400, "too_many_images", "images")


async def test_requests_over_the_pixels_that_may_wait_are_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    images = loader(max_pixels=15_000, ingress_replicas=2)
    go, begun = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(*_: object, **__: object) -> Image.Image:
        loop.call_soon_threadsafe(begun.set)
        assert go.wait(30)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(OpenedImage, "decode", slow)
    first = asyncio.create_task(images.pixels([("image", png(150, 100))], "a"))
    await begun.wait()
    with pytest.raises(ApiError, match="429"):
        await images.pixels([("image", png(150, 100))], "a")  # three quarters are the most of one caller
    second = asyncio.create_task(images.pixels([("image", png(150, 100))], "b"))
    go.set()
    await asyncio.gather(first, second)
    assert images.queue.pixels == 0


async def test_many_small_images_are_decoded_in_few_jobs_and_keep_their_order() -> None:
    images = loader()
    sides = [(20, 20 + number) for number in range(16)]
    inspected = await images.inspect([(f"images.{index}", png(*size)) for index, size in enumerate(sides)])
    assert [len(job) for job in jobs_of(inspected)] == [4, 4, 4, 4]
    assert [len(job) for job in jobs_of(inspected[:2])] == [1, 1], "each thread has one"
    large = await images.inspect([("images.0", png(1500, 1400)), *[("images.1", png(9, 9))] * 7])
    assert [len(job) for job in jobs_of(large)] == [1, 2, 2, 2, 1], "a large image is a job of its own"
    async with images.decoded(inspected) as together:
        pass
    alone = [(await images.pixels([("image", png(*size))]))[0] for size in sides]
    assert np.array_equal(together, alone)


def test_a_progressive_jpeg_counts_once_for_every_ten_scans() -> None:
    whole = jpeg(progressive=True)
    last = whole.rindex(b"\xff\xda")
    many = whole[:last] + whole[last:-2] * 50
    assert [decoding_pixels(open_image(data), data) for data in (jpeg(), whole, many)] == [600, 600, 600 * 5]


async def test_one_image_that_is_refused_by_its_header_keeps_the_others_from_being_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(OpenedImage, "decode", None)
    for data, code in ((b"", "image_missing"), (b"text", "image_format"), (png(3000, 1), "image_too_many_pixels")):
        with pytest.raises(ApiError) as caught:
            await loader(max_pixels=2999).pixels([("images.0", png(10, 10)), ("images.1", data)])
        assert (caught.value.code, caught.value.param) == (code, "images.1")


async def test_a_jpeg_is_decoded_at_the_scale_that_the_model_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    decode = OpenedImage.decode

    def recorded(opened: OpenedImage, *needed: Any) -> Image.Image:
        image = decode(opened, *needed)
        sizes.append(image.size)
        return image

    monkeypatch.setattr(OpenedImage, "decode", recorded)
    buffer = io.BytesIO()
    Image.effect_noise((160, 100), 80).save(buffer, "JPEG")
    images = ImageLoader(Preprocess(size=16), Serve())
    assert (await images.pixels([("image", buffer.getvalue())])).shape == (1, 16, 16, 3)
    assert [picture.shape for picture in await pictures(images, [("image", buffer.getvalue())])] == [(100, 160, 3)]
    assert sizes == [(40, 25), (160, 100)]


async def test_a_sample_that_ingest_accepted_has_a_png_as_its_thumbnail_however_large_it_is() -> None:
    data = await loader(max_image_bytes=1024, max_pixels=100).thumbnail(jpeg(), 20)
    assert len(jpeg()) > 1024
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == ("PNG", (20, 13))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_transparency_of_a_large_image_is_resolved_as_that_of_its_parts(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (50, 40, 4), np.uint8)
    image = Image.fromarray(noise).convert(mode)
    options = {"transparency": 7} if mode in "PL" else {}
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    whole = np.asarray(decode_image(buffer.getvalue()))
    monkeypatch.setattr("ratchet_client.images.BAND_PIXELS", 130)
    assert (np.asarray(decode_image(buffer.getvalue())) == whole).all()
    with Image.open(io.BytesIO(buffer.getvalue())) as opened:
        rgba = opened.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    assert (whole == np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))).all()


async def test_a_question_without_pictures_does_not_wait_for_those_with_some() -> None:
    images = loader(max_pixels=250)
    async with images.queue.reserved("a", 750), asyncio.timeout(5), images.pictures((), "a") as pictures:
        assert pictures == ()


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
    async with image_loader.pictures([("a", uri(red)), ("b", blue), ("c", red), ("d", png(4096, 64))]) as made:
        pass
    assert [image.shape for image in made] == [(3, 5, 3), (7, 2, 3), (3, 5, 3), (32, 2048, 3)]
    assert (made[0] == made[2]).all()
    assert (made[1] == np.array([0, 0, 255], np.uint8)).all()


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
    bounds = Serve(max_pixels=1_000_000)
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
