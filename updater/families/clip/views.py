"""Views of a pair: another part of its image, and another template around a short caption. Functions of id and view."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
from PIL import Image

from core.digests import digest12
from ratchet_client.images import open_accepted
from serving.engines.preprocess import Preprocess
from updater.data.pools import Pair
from updater.recipes import PLACE, Views

SHORT_WORDS = 3
"""A caption of at most so many words is the name of a thing, and no description."""


def view_pixels(preprocess: Preprocess, image: bytes, pair: Pair, views: Views) -> np.ndarray:
    """``uint8 [size, size, 3]`` of the image as a pair's view shows it; view 0 is what serving sees of it.

    Another view is a part of the image in its own proportions, at least ``views.area`` of it, at a random place, and
    mirrored half of the time if ``views.flip`` says so.

    Raises :class:`core.errors.RecordError` when it is no acceptable image.
    """
    if pair.view == 0:
        return preprocess.pixels(image)
    chance = random.Random(int(digest12(f"{pair.id} {pair.view}".encode()), 16))  # noqa: S311 - nothing is kept secret
    shrinks = math.sqrt(views.area)  # of a side, at most: so much more must be decoded

    def needed(size: tuple[int, int]) -> tuple[int, int]:
        width, height = preprocess.needed(size)
        return math.ceil(width / shrinks), math.ceil(height / shrinks)

    picture = open_accepted(image).decode(needed)
    side = math.sqrt(chance.uniform(views.area, 1.0))
    width, height = max(1, round(picture.width * side)), max(1, round(picture.height * side))
    left, top = chance.randint(0, picture.width - width), chance.randint(0, picture.height - height)
    part = picture.crop((left, top, left + width, top + height))
    if views.flip and chance.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return preprocess.pixels(part)


def phrased(pair: Pair, templates: Sequence[str]) -> str:
    """The caption; one that is the pair's label, or has a few words, in one of the templates: each view in the next.

    >>> phrased(Pair("7", "red kite", read=bytes), ["a photo of a {}"])
    'a photo of a red kite'
    """
    text = pair.text.strip()
    if not templates or not text or (text != pair.label and len(text.split()) > SHORT_WORDS):
        return pair.text
    first = int(digest12(pair.id.encode()), 16)
    return templates[(first + pair.view) % len(templates)].replace(PLACE, text)
