"""Answers as VQA v2 compares them, and what they earn."""

from __future__ import annotations

import pytest

from updater.gate.suite_items import grade, majority, normalise, polarity


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("The dog", "dog"),
        ("a red, round apple.", "red round apple"),
        ("Two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5 km", "3.5 km"),
        ("t-shirt", "t shirt"),
        ("dont know", "don't know"),
        ("don’t know", "don't know"),
        ("its tail", "its tail"),
        ("  what?!\n", "what"),
        ("The", ""),
    ],
)
def test_answers_are_compared_without_what_does_not_matter(answer: str, same: str) -> None:
    assert normalise(answer) == same
    assert normalise(normalise(answer)) == same


def test_exact_match_takes_any_reference() -> None:
    assert grade("exact_match", "A sofa.", ["couch", "sofa"]) == 1.0
    assert grade("exact_match", "sofa bed", ["couch", "sofa"]) == 0.0
    assert grade("exact_match", "", ["the"]) == 0.0, "an answer of nothing is never right"


@pytest.mark.parametrize(("agreeing", "earned"), [(0, 0.0), (1, 1 / 3), (2, 2 / 3), (3, 1.0), (10, 1.0)])
def test_vqa_accuracy_asks_for_three_who_agree(agreeing: int, earned: float) -> None:
    people = ["red"] * agreeing + ["blue"] * (10 - agreeing)
    assert grade("vqa_accuracy", "Red", people) == pytest.approx(earned)


def test_vqa_accuracy_of_few_references_is_exact_match() -> None:
    assert grade("vqa_accuracy", "red", ["red"]) == 1.0
    assert grade("vqa_accuracy", "red", ["blue", "red"]) == 1.0
    assert grade("vqa_accuracy", "red", ["blue", "green"]) == 0.0


def test_yes_and_no_are_the_first_word() -> None:
    assert grade("yes_no", "Yes, it is.", ["yes"]) == 1.0
    assert grade("yes_no", "No!", ["yes"]) == 0.0
    assert grade("yes_no", "a dog", ["no"]) == 0.0
    assert [polarity(answer) for answer in ("yes", "NO.", "yesterday", "")] == ["yes", "no", "", ""]


def test_the_majority_answer_is_what_needs_no_image() -> None:
    assert majority("exact_match", [("red",), ("Red.",), ("blue",), ("green",)]) == ("red", 0.5)
    assert majority("yes_no", [("no",), ("no",), ("yes",)]) == ("no", pytest.approx(2 / 3))
    assert majority("vqa_accuracy", [("red", "red", "blue"), ("blue", "blue", "blue")])[0] == "blue"
