from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from core.errors import RecordError
from core.settings.streams import Ingest
from ratchet_client.images import decode_image, sniff
from streams.ingest.validate import Accepted, Received, Rules, validate
from tests.support.hostile_images import REFUSED, TAKEN, Hostile, encode, plain, png

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP"]
WHOLE = np.asarray(plain(), np.int16)


def solid(mode: str, size: tuple[int, int], color: Any) -> Image.Image:
    return Image.new(mode, size, color)


def pixels(data: bytes) -> Any:
    return np.asarray(decode_image(data), np.int16)


def reason(data: bytes, **bounds: int) -> str:
    with pytest.raises(RecordError) as caught:
        decode_image(data, **bounds)
    assert "object at 0x" not in str(caught.value)
    return str(caught.value.reason)


def named(images: list[Hostile]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("image", images, ids=[each.name for each in images])


@pytest.mark.parametrize("kind", FORMATS)
def test_each_allowed_format_is_decoded_and_refused_when_it_is_truncated(kind: str) -> None:
    data = encode(solid("RGB", (40, 20), (200, 30, 60)), kind)
    image = decode_image(data)
    assert (sniff(data), image.mode, image.size) == (kind, "RGB", (40, 20))
    assert np.abs(pixels(data) - (200, 30, 60)).max() < 12
    data = encode(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), kind)
    assert reason(data[: len(data) // 2]) == "image_undecodable"


@pytest.mark.parametrize("size", [(30_000, 30_000), (2**31 - 1, 2**31 - 1), (50_000_000, 1)])
def test_a_bomb_is_refused_before_it_is_decoded(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("the bomb was decoded"), raising=True)
    assert reason(png(*size, 8, 2, b"\0" * 1000)) == "image_too_many_pixels"


def test_sizes_are_bounded_in_bytes_and_at_the_short_side() -> None:
    thin = encode(solid("RGB", (64, 4), 0))
    assert reason(thin, max_bytes=50) == "image_too_large"
    assert reason(thin, min_side=8) == "image_too_small"
    assert decode_image(thin, min_side=4).size == (64, 4)


def test_a_transparent_colour_is_white_and_the_others_stay() -> None:
    (palette,) = [each for each in TAKEN if each.name == "palette with alpha"]
    found = pixels(palette.data)
    assert (found[:4, :4] == 255).all() and np.abs(found - WHOLE)[4:].max() == 0
    grey = png(2, 1, 16, 0, b"\0\x12\x34\x80\x00", (b"tRNS", b"\x80\x00"))
    assert pixels(grey)[0].tolist() == [[0x12] * 3, [255] * 3]


@named([each for each in TAKEN if each.same_as_plain])
def test_an_odd_image_is_shown_as_it_was_meant(image: Hostile) -> None:
    found = pixels(image.data)
    assert found.shape == WHOLE.shape and np.abs(found - WHOLE).max() <= image.tolerance


@named([*TAKEN, *REFUSED])
def test_what_is_no_acceptable_image_is_refused_by_name_and_ingest_says_the_same(image: Hostile) -> None:
    record = Received("t", 0, 0, image.data, None, [("content-type", b"image/png"), ("ratchet_text", b"a picture")])
    result = validate(record, Rules(Ingest(min_side=1)))
    if image.code:
        assert reason(image.data) == image.code and not isinstance(result, Accepted)
        assert (result["kind"], result["reason"]) == ("quarantine", "empty" if not image.data else image.code)
    else:
        assert isinstance(result, Accepted) and result.row["image"] == image.data


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
