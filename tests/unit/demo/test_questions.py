from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from demo.data.questions_make import Picture, Question, colour_shares, main_colour, make_questions
from demo.data.questions_words import with_article

THINGS = {"animal": "cat dog cow pig", "food": "pear plum bread", "vehicle": "car bus tram boat", "tool": "axe saw"}
SORTS = "big small old new round flat tall wild tame clean odd plain"
SHADES = ("red", "green", "blue", "black")


def world() -> list[Picture]:
    """Three artists draw things of four kinds, twelve sorts of each; every seventh concept is held out."""
    pictures = []
    number = 0
    for kind, names in THINGS.items():
        for thing in names.split():
            for sort in SORTS.split():
                number += 1
                title, colour = f"{sort} {thing}", SHADES[number % 4]
                split = "test" if number % 7 == 0 else "train"
                for hand in ("ink", "oil", "chalk"):
                    path, shares = Path(hand) / f"{title}.png", {colour: 0.9, "yellow": 0.05}
                    pictures.append(Picture(path, hand, title, split, title, thing, kind, shares))
    return pictures


@pytest.fixture(scope="module")
def rows() -> list[Question]:
    return make_questions(world())


def of(rows: list[Question], split: str, *kinds: str) -> list[Question]:
    return [row for row in rows if row.split == split and row.kind in kinds]


def test_every_kind_is_asked_again_alike_in_both_splits_each_picture_in_one(rows: list[Question]) -> None:
    asked = Counter((row.split, row.kind) for row in rows)
    for split in ("train", "test"):
        assert all(asked[split, kind] > 20 for kind in ("name", "colour", "presence", "category")), asked
    splits = defaultdict(set)
    for row in rows:
        splits[row.picture.path].add(row.split)
        assert 1 <= len(row.answers) <= 2 and all(row.answers)
    assert {len(found) for found in splits.values()} == {1}
    assert make_questions(world()) == rows


def test_colour_and_category_are_tested_on_concepts_that_were_never_trained(rows: list[Question]) -> None:
    trained = {row.picture.concept for row in rows if row.split == "train"}
    tested = {row.picture.concept for row in of(rows, "test", "colour", "category")}
    assert tested and not tested & trained


def test_yes_and_no_are_true_and_asked_in_the_same_words_as_often(rows: list[Question]) -> None:
    said: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in (row for row in rows if row.kind == "presence"):
        said[row.split, row.question][row.answers[0]] += 1
        picture, words = row.picture, row.question.rstrip("?").split()
        named = any(with_article(word) in row.question for word in (picture.name, picture.category))
        shaded = any(share > 0.2 for colour, share in picture.colours.items() if colour in words)
        assert (named or shaded) == (row.answers[0] == "yes"), row
    assert {split for split, _ in said} == {"train", "test"}
    assert all(counts["yes"] == counts["no"] for counts in said.values())


def test_a_word_has_the_article_that_it_takes() -> None:
    words = [with_article(word) for word in ("apple", "bus", "clothing", "skis", "cross")]
    assert words == ["an apple", "a bus", "clothing", "skis", "a cross"]


def drawing(*colours: str) -> Image.Image:
    image = Image.new("RGB", (120, 120), "white")
    pen = ImageDraw.Draw(image)
    width = 60 // len(colours)
    for i, colour in enumerate(colours):
        pen.rectangle((30 + i * width, 30, 29 + (i + 1) * width, 89), fill=colour)
    return image


def test_what_has_no_main_colour_is_nothing_to_ask_about() -> None:
    for skin_turquoise_or_pale in ("#ffe0bd", "#30c8c8", "#dfe8ee"):
        assert main_colour(colour_shares(drawing(skin_turquoise_or_pale))) == ""
    paper = Image.new("RGB", (120, 120), "white")
    assert colour_shares(paper) == {} and main_colour({}) == ""
    ImageDraw.Draw(paper).rectangle((0, 0, 19, 19), fill="red")
    assert colour_shares(paper) == {}, "a speck is no drawing"
    equal = colour_shares(drawing("#d8262c", "#1f6fd0"))
    assert equal == {"red": 0.5, "blue": 0.5} and main_colour(equal) == ""
    assert main_colour(colour_shares(drawing("#d8262c", "#d8262c", "#d8262c", "#1f6fd0"))) == "red"
