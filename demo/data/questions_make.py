"""From pictures with known name, category and colours to questions with answers.

A picture is in one split with all its questions. `test` has pictures of concepts that no training picture shows (a
siamese cat, where there were other cats), and held-out drawings of trained concepts in another style. Both are asked
for names, only the first for colours and categories. Yes/no questions come in pairs with the same words and opposite
answers, so that words alone are uninformative.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from demo.data import questions_words as words

HELD_OUT: Final = 0.6
"""Share of concepts with several drawings of which one is held out for the test."""
SOME: Final = 0.2
"""Share from which a colour counts as present; below `HARDLY` it counts as absent; between, it is not asked about."""
HARDLY: Final = 0.01


@dataclass(frozen=True, slots=True)
class Caps:
    """Maximum questions per answer (or thing asked for), so that no answer is the safe guess."""

    answers: int
    things: int
    kinds: int


CAPS: Final = {"train": Caps(answers=400, things=30, kinds=120), "test": Caps(answers=30, things=3, kinds=6)}


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture and its known facts. Empty strings: none, or unclear."""

    path: Path
    hand: str
    """The domain, which determines the style."""
    concept: str
    split: str
    title: str = ""
    """Its exact name, equal in all styles."""
    name: str = ""
    """The name that a person would give it at first sight."""
    category: str = ""
    colours: dict[str, float] = field(default_factory=dict)
    related: frozenset[str] = frozenset()
    """Further words that may apply to it: not asked about as absent."""


@dataclass(frozen=True, slots=True)
class Question:
    picture: Picture
    split: str
    kind: str
    """`name`, `colour`, `presence` or `category`."""
    question: str
    answers: tuple[str, ...]


def make_questions(pictures: Sequence[Picture]) -> list[Question]:
    """All questions, shuffled so that the first few hundred of a split and kind are representative."""
    held_out = held_out_drawings(pictures)
    trained = [p for p in pictures if p.split == "train" and p.path not in held_out]
    rows: list[Question] = []
    for split in ("train", "test"):
        concepts = trained if split == "train" else [p for p in pictures if p.split == "test"]
        drawings = trained if split == "train" else [*concepts, *(p for p in pictures if p.path in held_out)]
        caps, dice = CAPS[split], random.Random(f"questions:{split}")  # noqa: S311
        rows += _open(drawings, split, "name", lambda p: p.name, _names, words.ASK_NAME, caps.answers, dice)
        rows += _open(
            concepts, split, "category", lambda p: p.category, words.CATEGORIES.__getitem__, words.ASK_CATEGORY,
            caps.answers, dice,
        )  # fmt: skip
        rows += _open(
            concepts, split, "colour", lambda p: main_colour(p.colours), words.COLOURS.__getitem__, words.ASK_COLOUR,
            caps.answers, dice,
        )  # fmt: skip
        rows += _presence(drawings, concepts, split, caps, dice)
    random.Random("questions:order").shuffle(rows)  # noqa: S311
    return rows


def held_out_drawings(pictures: Iterable[Picture]) -> frozenset[Path]:
    """One drawing each of a share of the trained concepts with several drawings; stable, by hash."""
    hands: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        if picture.title and picture.split == "train":
            hands[picture.concept].append(picture)
    chosen = set()
    for concept, drawings in hands.items():
        number = int.from_bytes(hashlib.sha256(f"drawing:{concept}".encode()).digest()[:8])
        if len({p.hand for p in drawings}) == len(drawings) > 1 and number / 2**64 < HELD_OUT:
            chosen.add(sorted(drawings, key=lambda p: p.path)[number % len(drawings)].path)
    return frozenset(chosen)


def _names(name: str) -> tuple[str, ...]:
    other = words.SYNONYMS.get(name)
    return (name, other) if other else (name,)


def _open(
    pictures: Sequence[Picture],
    split: str,
    kind: str,
    about: Callable[[Picture], str],
    answers: Callable[[str], tuple[str, ...]],
    asks: Sequence[str],
    cap: int,
    dice: random.Random,
) -> Iterator[Question]:
    seen: Counter[str] = Counter()
    for picture in dice.sample(pictures, len(pictures)):
        answer = about(picture)
        if answer and seen[answer] < cap:
            seen[answer] += 1
            yield Question(picture, split, kind, dice.choice(asks), answers(answer))


def _presence(
    drawings: Sequence[Picture], concepts: Sequence[Picture], split: str, caps: Caps, dice: random.Random
) -> Iterator[Question]:
    for name in sorted({p.name for p in drawings} - {""}):
        there = [p for p in drawings if p.name == name]
        absent = [p for p in drawings if p.name not in ("", name) and name not in p.related and name != p.category]
        yield from _pairs(there, absent, words.with_article(name), words.ASK_THING, caps.things, split, dice)
    for kind in words.CATEGORIES:
        there = [p for p in concepts if p.category == kind]
        absent = [p for p in concepts if p.category and p.category not in _near(kind)]
        yield from _pairs(there, absent, words.with_article(kind), words.ASK_KIND, caps.kinds, split, dice)
    for colour in words.COLOURS:
        there = [p for p in concepts if p.colours.get(colour, 0) >= SOME]
        absent = [p for p in concepts if p.colours and p.colours.get(colour, 0) < HARDLY]
        yield from _pairs(there, absent, colour, words.ASK_SHADE, 2 * caps.kinds, split, dice)


def _near(kind: str) -> frozenset[str]:
    """Categories that may apply to the same picture."""
    groups = (
        ("animal", "bird", "insect", "creature"), ("creature", "person", "face"), ("vehicle", "vehicle part"),
        ("symbol", "arrow", "clock", "flag", "heart"), ("food", "drink", "plant"), ("tool", "gun"),
        ("hand", "person"), ("terrain", "furniture", "plant", "building"),
    )  # fmt: skip
    return frozenset((kind, *(other for group in groups if kind in group for other in group)))


def _pairs(
    there: Sequence[Picture],
    absent: Sequence[Picture],
    thing: str,
    asks: Sequence[str],
    most: int,
    split: str,
    dice: random.Random,
) -> Iterator[Question]:
    count = min(most, len(there), len(absent))
    for yes, no in zip(dice.sample(there, count), dice.sample(absent, count), strict=True):
        text = dice.choice(asks).format(thing)
        yield Question(yes, split, "presence", text, ("yes",))
        yield Question(no, split, "presence", text, ("no",))


NAMES: Final = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "grey", "black", "")
"""The last one means pale or between two names, and is never asked about."""
_NONE: Final = len(NAMES) - 1
PAPER: Final = 240
"""A pixel with at least this value in all three channels is the white canvas."""
MIN_COVER: Final = 0.04
"""A drawing that covers less of the canvas has no colour."""
MAIN_SHARE: Final = 0.55
"""Minimum share of the main colour; the second may have at most half as much."""


def colour_shares(image: Image.Image) -> dict[str, float]:
    """Share of the drawn (non-white) pixels by colour name; empty for a nearly blank drawing."""
    rgb = np.asarray(image.convert("RGB"))
    drawn = rgb.min(axis=2) < PAPER
    if drawn.mean() < MIN_COVER:
        return {}
    hsv = np.asarray(image.convert("HSV"))[drawn]
    counts = np.bincount(_named(hsv), minlength=len(NAMES)) / len(hsv)
    return {name: float(share) for name, share in zip(NAMES, counts, strict=True) if name and share > 0}


def main_colour(shares: dict[str, float]) -> str:
    order = sorted(shares, key=lambda name: (-shares[name], name))
    if not order or shares[order[0]] < MAIN_SHARE:
        return ""
    second = shares[order[1]] if len(order) > 1 else 0.0
    return order[0] if second <= shares[order[0]] / 2 else ""


def _named(hsv: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Index into `NAMES` of each pixel; `hsv` is ``[n, 3]``, all channels up to 255."""
    hue = hsv[:, 0].astype(np.float32) * (360 / 255)
    saturation, value = hsv[:, 1] / 255, hsv[:, 2] / 255
    index_of = NAMES.index
    warm = (hue < 14) | (hue >= 344)
    rules = [
        ((value < 0.22) | ((value < 0.33) & (saturation < 0.35)), index_of("black")),
        ((saturation < 0.13) & (value < 0.85), index_of("grey")),
        (saturation < 0.2, _NONE),
        (warm & (saturation < 0.55) & (value > 0.75), index_of("pink")),
        (warm & (value < 0.45), index_of("brown")),
        (warm, index_of("red")),
        ((hue < 42) & (value < 0.72), index_of("brown")),
        ((hue < 42) & (saturation < 0.55), _NONE),  # skin
        (hue < 40, index_of("orange")),
        ((hue < 68) & (value < 0.55), index_of("brown")),
        (hue < 68, index_of("yellow")),
        (hue < 165, index_of("green")),
        (hue < 185, _NONE),  # turquoise
        (hue < 255, index_of("blue")),
        (hue < 292, index_of("purple")),
        (value < 0.6, index_of("purple")),
    ]
    return np.select([rule for rule, _ in rules], [name for _, name in rules], default=index_of("pink")).astype(
        np.int64
    )
