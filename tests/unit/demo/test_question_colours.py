"""The colour of a drawing is measured as a person would name it, and not at all where people would disagree."""

from __future__ import annotations

import pytest
from PIL import Image, ImageDraw

from demo.data.questions_pictures import NAMES, colour_shares, main_colour


def drawing(*colours: str, paper: str = "white") -> Image.Image:
    """Stripes of equal width on half of the canvas."""
    image = Image.new("RGB", (120, 120), paper)
    pen = ImageDraw.Draw(image)
    width = 60 // len(colours)
    for i, colour in enumerate(colours):
        pen.rectangle((30 + i * width, 30, 29 + (i + 1) * width, 89), fill=colour)
    return image


@pytest.mark.parametrize(
    ("painted", "named"),
    [("#d8262c", "red"), ("#f58220", "orange"), ("#ffcc4d", "yellow"), ("#3aa655", "green"), ("#1f6fd0", "blue"),
     ("#8a4fd0", "purple"), ("#f28cb8", "pink"), ("#7a4a21", "brown"), ("#8d8d8d", "grey"), ("#1a1a1a", "black")],
)  # fmt: skip
def test_plain_colours_have_their_names(painted: str, named: str) -> None:
    shares = colour_shares(drawing(painted))
    assert shares == {named: 1.0}
    assert main_colour(shares) == named


@pytest.mark.parametrize("painted", ["#ffe0bd", "#30c8c8", "#dfe8ee"])
def test_skin_turquoise_and_pale_are_nothing_to_ask_about(painted: str) -> None:
    assert main_colour(colour_shares(drawing(painted))) == ""


def test_two_colours_of_equal_size_have_no_main_one() -> None:
    shares = colour_shares(drawing("#d8262c", "#1f6fd0"))
    assert shares == {"red": 0.5, "blue": 0.5}
    assert main_colour(shares) == ""
    assert main_colour(colour_shares(drawing("#d8262c", "#d8262c", "#d8262c", "#1f6fd0"))) == "red"


def test_the_white_paper_is_no_colour_and_a_speck_no_drawing() -> None:
    image = Image.new("RGB", (120, 120), "white")
    assert colour_shares(image) == {}
    ImageDraw.Draw(image).rectangle((0, 0, 19, 19), fill="red")
    assert colour_shares(image) == {}
    assert main_colour({}) == ""


def test_every_pixel_has_at_most_one_name() -> None:
    gradient = Image.linear_gradient("L").resize((64, 64))
    image = Image.merge("HSV", (gradient, gradient.rotate(90), gradient.rotate(180))).convert("RGB")
    shares = colour_shares(image)
    assert set(shares) <= set(NAMES)
    assert 0 < sum(shares.values()) <= 1 + 1e-9
