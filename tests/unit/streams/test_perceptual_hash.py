from __future__ import annotations

import io
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageColor, ImageDraw, ImageFont

from ratchet_client.images import decode_image
from streams.ingest.duplicates import DuplicateIndex, KnownSample
from streams.ingest.perceptual_hash import (
    COLOUR_TOLERANCE,
    FEW,
    HASH_BYTES,
    PerceptualHash,
    SplitRule,
    buckets,
    perceptual_hash,
    similar,
)
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.samples import TOPIC, put, sample

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
LOSSLESS = [encoded("PNG"), encoded("BMP"), encoded("WEBP", lossless=True)]
LOSSY: dict[str, Copy] = {
    "jpeg 70": encoded("JPEG", quality=70), "jpeg 90": encoded("JPEG", quality=90),
    "webp 80": encoded("WEBP", quality=80), "half": half, "half, jpeg": lambda image: JPEG(half(image)),
}  # fmt: skip


def photographs(count: int) -> Iterator[Image.Image]:
    random = np.random.default_rng(0)
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    whole = decode_image(path.read_bytes())
    for _ in range(count):
        width, height = random.integers(90, 300, 2)
        left, top = random.integers(0, whole.width - width), random.integers(0, whole.height - height)
        yield whole.crop((left, top, left + width, top + height))


def texture(number: int) -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC)


def flags() -> Iterator[Image.Image]:
    """Three pure stripes, which JPEG changes the most."""
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


def photographs_and_textures() -> list[Image.Image]:
    return [*photographs(60), *map(texture, range(60))]


def test_a_copy_that_lost_something_looks_alike_and_is_nearly_always_in_the_same_bucket() -> None:
    moved = []
    for image in [*photographs_and_textures(), *flags()]:
        mine = perceptual_hash(image)
        for name, copy in LOSSY.items():
            other = perceptual_hash(copy(image))
            assert similar(mine, other, 4), name
            moved.append(buckets(other)[0] != buckets(mine)[0])
    assert np.mean(moved[: 120 * len(LOSSY)]) < 0.06, "of photographs and textures"


def test_equal_pixels_have_one_look_and_pictures_of_any_mode_and_shape_have_one() -> None:
    for image in [*photographs_and_textures(), *flags()][::5]:
        assert {perceptual_hash(copy(image)) for copy in LOSSLESS} == {perceptual_hash(image)}
    for mode in ("L", "RGBA", "P", "1"):
        for size in ((1, 1), (1, 400), (400, 1), (31, 33), (700, 20)):
            assert len(perceptual_hash(Image.new(mode, size)).data) == HASH_BYTES


def test_other_pictures_do_not_look_alike_though_their_shapes_may_be_one() -> None:
    looks = [perceptual_hash(shirt(colour)) for colour in SHIRTS]
    pairs = [(one, other) for number, one in enumerate(looks) for other in looks[:number]]
    assert any(one.phash == other.phash for one, other in pairs)
    assert not any(similar(one, other, 64) for one, other in pairs)
    looks = [perceptual_hash(image) for image in [*map(texture, range(60)), *flags()][:75]]
    assert not any(similar(one, other, 4) for n, one in enumerate(looks) for other in looks[:n])


def test_plain_pictures_look_alike_within_the_tolerance_only() -> None:
    plain = perceptual_hash(Image.new("RGB", (64, 64), (100, 150, 200)))
    assert plain == PerceptualHash(0, bytes((100, 150, 200)) * 9)
    for change, alike in ((COLOUR_TOLERANCE, True), (COLOUR_TOLERANCE + 1, False)):
        other = perceptual_hash(Image.new("RGB", (99, 33), (100, 150 - change, 200)))
        assert similar(plain, other, 0) == similar(other, plain, 0) == alike


COUNT = 300
FONT = ImageFont.load_default(10)
RULES = [SplitRule(bytes([number]) * 32, 0.15) for number in range(12)]


def invoice(number: int) -> Image.Image:
    drawn = random.Random(number)
    page = Image.new("RGB", (310, 438), "white")
    draw = ImageDraw.Draw(page)
    draw.rectangle((20, 20, 125, 40), fill=(20, 60, 120))
    for y in range(75, 75 + 15 * drawn.randint(3, 20), 15):
        words = drawn.choice(["Bolt M8", "Labour", "Freight", "Paint", "Cable 3x1.5"])
        draw.text((22, y), f"{words} {drawn.randint(1, 99)}", "black", FONT)
        draw.text((250, y), f"{drawn.uniform(1, 999):.2f}", "black", FONT)
    return page


def plain(number: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (number % 7 * 40, number // 7 * 5, 128))


KINDS: dict[str, Callable[[int], Image.Image]] = {
    "invoices": invoice, "one colour": plain, "textures": texture,
}  # fmt: skip


@cache
def looks(kind: str) -> list[bytes]:
    return [perceptual_hash(KINDS[kind](number)).data for number in range(COUNT)]


def item(number: int, look: bytes, domain: str = "", asks: bool = False) -> KnownSample:
    return KnownSample(
        sha256(f"{domain} {number}".encode()).digest(), f"{TOPIC}:0:{number}", look, number, domain, asks
    )


def sides(rule: SplitRule, given: list[bytes], domain: str = "") -> list[bool]:
    with closing(DuplicateIndex(":memory:", "store", -1, rule)) as index:
        return [index.add(item(number, look, domain)) == "fresh_eval" for number, look in enumerate(given)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tenth_to_a_fifth_of_each_kind_is_held_out(kind: str) -> None:
    for rule in RULES:
        held = sides(rule, looks(kind))
        assert 0.1 <= np.mean(held) <= 0.2
        by_look = set(zip(looks(kind), held, strict=True))
        assert len(by_look) == len(set(looks(kind))), "pictures that look the same are on one side"


def test_kinds_that_come_mixed_have_their_share_each_and_none_where_the_share_is_none() -> None:
    for rule in RULES:
        with closing(DuplicateIndex(":memory:", "store", -1, rule)) as index:
            held = defaultdict(list)
            for number in range(COUNT):
                for kind in KINDS:
                    held[kind].append(index.add(item(number, looks(kind)[number], kind)) == "fresh_eval")
        assert all(0.1 <= np.mean(each) <= 0.2 for each in held.values()), {k: np.mean(v) for k, v in held.items()}
    assert not any(sides(SplitRule(b"a" * 32, 0.0), looks("invoices")))


def test_look_alikes_stay_together_while_they_are_few() -> None:
    alike = [bytes(8) + bytes([128]) * 26 + bytes([128 + number]) for number in range(FEW)]
    assert len({buckets(PerceptualHash.parse(each))[0] for each in alike}) == 1
    assert all(len(set(sides(rule, alike))) == 1 for rule in RULES)
    many = [bytes(8) + bytes([124 + number % 8, 124 + number // 8 % 8, *[128] * 25]) for number in range(64)]
    assert all(len(set(sides(rule, many))) == 2 for rule in RULES)


def test_the_split_cannot_be_known_without_the_key_and_is_made_again_alike_after_a_batch_that_failed() -> None:
    one, other = (sides(SplitRule(key * 32, 0.5), looks("textures")) for key in (b"a", b"b"))
    assert 0.35 < np.mean([a == b for a, b in zip(one, other, strict=True)]) < 0.65
    with closing(DuplicateIndex(":memory:", "store", -1, SplitRule(b"a" * 32, 0.5))) as index:
        for _ in range(2):
            with pytest.raises(LookupError), index.deciding():
                again = [index.add(item(n, look)) == "fresh_eval" for n, look in enumerate(looks("textures"))]
                raise LookupError
            assert again == one


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_that_is_made_again_from_the_store_goes_on_alike(
    kind: str, store: SampleStore, tmp_path: Path
) -> None:
    half = COUNT // 2

    def opened(name: str) -> closing[DuplicateIndex]:
        return closing(DuplicateIndex(tmp_path / name, "store", -1, RULES[1]))

    def follow(index: DuplicateIndex) -> None:
        with index.deciding():
            index.follow(store.table)

    with opened("a.db") as index, opened("b.db") as again, opened("c.db") as third:
        decided = [index.add(item(n, look)) for n, look in enumerate(looks(kind)[:half])]
        stored = [
            sample(0, n, id=item(n, look).id.hex(), look=look, split=split, domain="")
            for n, (look, split) in enumerate(zip(looks(kind)[:half], decided, strict=True))
        ]
        put(store, stored, Position(TOPIC, 0, half))
        for each in (index, again, third):
            follow(each)  # counts nothing twice
        rest = [item(n, look) for n, look in enumerate(looks(kind)[half:], half)]
        assert [index.add(each) for each in rest] == [again.add(each) for each in rest]
        by_look = dict(zip(looks(kind)[:half], decided, strict=True))
        for number, (look, split) in enumerate(by_look.items(), COUNT):
            assert third.add(item(number, look, "another domain")) == split
