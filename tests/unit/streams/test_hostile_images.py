from __future__ import annotations

import numpy as np
import pytest

from core.errors import RecordError
from core.settings.streams import Ingest
from ratchet_client.images import decode_image
from serving.engines.preprocess import Preprocess, ResizeMode
from streams.ingest.validate import Accepted, Received, Rules, validate
from tests.support.hostile_images import LEFT, REFUSED, TAKEN, Hostile, plain

WHOLE = np.asarray(plain(), np.int16)


def named(images: list[Hostile]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("image", images, ids=[each.name for each in images])


@named([each for each in TAKEN if each.same_as_plain])
def test_an_odd_image_is_shown_as_it_was_meant(image: Hostile) -> None:
    found = np.asarray(decode_image(image.data), np.int16)
    assert found.shape == WHOLE.shape
    assert np.abs(found - WHOLE).max() <= image.tolerance


def test_a_transparent_colour_of_a_palette_is_white_and_the_others_stay() -> None:
    (image,) = [each for each in TAKEN if each.name == "palette with alpha"]
    found = np.asarray(decode_image(image.data), np.int16)
    assert (found[:4, :4] == 255).all()
    assert np.abs(found - WHOLE)[4:].max() == 0


def test_a_transparent_grey_of_sixteen_bits_is_white() -> None:
    from tests.support.hostile_images import png

    data = png(2, 1, 16, 0, b"\0\x12\x34\x80\x00", (b"tRNS", b"\x80\x00"))
    assert np.asarray(decode_image(data))[0].tolist() == [[0x12] * 3, [255] * 3]


@named(REFUSED)
def test_what_is_no_acceptable_image_is_refused_by_name(image: Hostile) -> None:
    with pytest.raises(RecordError) as caught:
        decode_image(image.data)
    assert caught.value.reason == image.code
    assert "object at 0x" not in str(caught.value)


@named(TAKEN)
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_every_image_that_is_taken_fits_the_model(image: Hostile, mode: ResizeMode) -> None:
    pixels = Preprocess(size=64, resize_mode=mode).pixels(decode_image(image.data))
    assert pixels.shape == (64, 64, 3)
    if image.name.startswith(("1 pixel", "a thread")) and mode == "shortest":
        assert (np.abs(pixels.astype(np.int16) - LEFT) <= 1).all()


def test_of_a_thread_the_middle_is_looked_at() -> None:
    from PIL import Image

    thread = Image.new("RGB", (2_000_000, 8), (255, 255, 255))
    thread.paste(LEFT, (999_000, 0, 1_001_000, 8))
    pixels = Preprocess(size=32).pixels(thread)
    assert (np.abs(pixels.astype(np.int16) - LEFT) <= 1).all()


@named([*TAKEN, *REFUSED])
def test_ingest_says_the_same(image: Hostile) -> None:
    record = Received("t", 0, 0, image.data, None, [("content-type", b"image/png"), ("ratchet_text", b"a picture")])
    result = validate(record, Rules(Ingest(min_side=1)))
    if image.code:
        assert not isinstance(result, Accepted)
        assert (result["kind"], result["reason"]) == ("quarantine", "empty" if not image.data else image.code)
    else:
        assert isinstance(result, Accepted)
        assert result.row["image"] == image.data
