"""A picture looks like its copies, and not like others."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageColor, ImageDraw

from ratchet_client.images import decode_image
from streams.ingest.look import COLOUR_TOLERANCE, LOOK_BYTES, Look, buckets, look_of, similar

SHIRTS = ["red", "green", "blue", "yellow", "purple", "orange"]
Copy = Callable[[Image.Image], Image.Image]


def encoded(kind: str, **options: Any) -> Copy:
    def copy(image: Image.Image) -> Image.Image:
        data = io.BytesIO()
        image.save(data, kind, **options)
        return decode_image(data.getvalue())

    return copy


def half(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)


JPEG = encoded("JPEG")
LOSSLESS = {"png": encoded("PNG"), "bmp": encoded("BMP"), "webp": encoded("WEBP", lossless=True)}
LOSSY: dict[str, Copy] = {
    "jpeg 70": encoded("JPEG", quality=70), "jpeg 90": encoded("JPEG", quality=90),
    "webp 80": encoded("WEBP", quality=80), "half": half, "half, jpeg": lambda image: JPEG(half(image)),
}  # fmt: skip


def photographs(count: int) -> Iterator[Image.Image]:
    """Different parts of a photograph, of all sizes and shapes."""
    random = np.random.default_rng(0)
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    whole = decode_image(path.read_bytes())
    for _ in range(count):
        width, height = random.integers(90, 300, 2)
        left, top = random.integers(0, whole.width - width), random.integers(0, whole.height - height)
        yield whole.crop((left, top, left + width, top + height))


def textures(count: int, side: int = 64) -> Iterator[Image.Image]:
    """Smooth random pictures."""
    random = np.random.default_rng(1)
    for _ in range(count):
        noise = random.integers(0, 256, (5, 5, 3), np.uint8)
        yield Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


def flags() -> Iterator[Image.Image]:
    """Three pure stripes: what JPEG changes the most."""
    for number in range(30):
        flag = np.zeros((3, 1, 3), np.uint8)
        for stripe in range(3):
            flag[stripe, 0] = ImageColor.getrgb(SHIRTS[(number // 6**stripe + stripe) % 6])
        image = Image.fromarray(flag).resize((120, 90), Image.Resampling.NEAREST)
        yield image.transpose(Image.Transpose.ROTATE_90) if number % 2 else image


def shirt(colour: str) -> Image.Image:
    image = Image.new("RGB", (128, 128), "white")
    outline = [(40, 20), (88, 20), (120, 50), (104, 64), (92, 54), (92, 112), (36, 112), (36, 54), (24, 64), (8, 50)]
    ImageDraw.Draw(image).polygon(outline, fill=colour)
    return image


def pictures() -> list[Image.Image]:
    return [*photographs(60), *textures(60), *flags()]


@pytest.mark.parametrize("copy", LOSSY.values(), ids=LOSSY)
def test_a_copy_that_lost_something_looks_alike(copy: Copy) -> None:
    assert all(similar(look_of(image), look_of(copy(image)), 4) for image in pictures())


@pytest.mark.parametrize("copy", LOSSLESS.values(), ids=LOSSLESS)
def test_equal_pixels_have_one_look(copy: Copy) -> None:
    for image in pictures()[::5]:
        assert look_of(copy(image)) == look_of(image)


def test_copies_that_lost_something_are_nearly_always_in_the_same_bucket() -> None:
    moved = []
    for image in [*photographs(60), *textures(60)]:
        coarse, *_ = buckets(look_of(image))
        moved += [buckets(look_of(copy(image)))[0] != coarse for copy in LOSSY.values()]
    assert np.mean(moved) < 0.06


def test_shirts_in_six_colours_do_not_look_alike_though_their_shapes_are_one() -> None:
    looks = [look_of(shirt(colour)) for colour in SHIRTS]
    pairs = [(one, other) for number, one in enumerate(looks) for other in looks[:number]]
    assert any(one.phash == other.phash for one, other in pairs)
    assert not any(similar(one, other, 64) for one, other in pairs)


def test_plain_pictures_look_alike_within_the_tolerance_only() -> None:
    plain = look_of(Image.new("RGB", (64, 64), (100, 150, 200)))
    assert plain == Look(0, bytes((100, 150, 200)) * 9)
    for change, alike in ((COLOUR_TOLERANCE, True), (COLOUR_TOLERANCE + 1, False)):
        other = look_of(Image.new("RGB", (99, 33), (100, 150 - change, 200)))
        assert similar(plain, other, 0) == similar(other, plain, 0) == alike


def test_other_pictures_do_not_look_alike() -> None:
    looks = [look_of(image) for image in [*textures(60), *flags()][:75]]
    assert not any(similar(one, other, 4) for n, one in enumerate(looks) for other in looks[:n])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_pictures_of_any_mode_and_shape_have_a_look(mode: str) -> None:
    for size in ((1, 1), (1, 400), (400, 1), (31, 33), (700, 20)):
        assert len(look_of(Image.new(mode, size)).data) == LOOK_BYTES
