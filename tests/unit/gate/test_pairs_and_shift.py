"""Pairs that look alike to the base, shares of yes, and how far features move: on given vectors and answers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.gate.builders import fresh_suite, picture, question_rows, sample_rows
from updater.gate.diagnostics import (
    feature_shift,
    hard_pairs,
    mean_shift,
    mine_pairs,
    modality_gap,
    pair_accuracy,
    told_apart,
    yes_share,
)
from updater.gate.run import diagnose
from updater.gate.suite_items import Item
from updater.gate.suites import Suite
from updater.gate.verdict import Diagnostics, YesShare

N, DIM, TWINS = 80, 64, 12
"""Items; the first TWINS of them look like the next TWINS."""


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


class GivenVectors:
    """A scorer whose models know every text, and see only part of what tells twins apart."""

    def __init__(self, sight: dict[str | None, float], folder: Path | None = None) -> None:
        """``sight``: by model, how much of the difference between twins it sees, from -1 (the wrong way) to 1."""
        self.sight, self.kept, self.embedded = sight, folder, 0
        words = np.random.default_rng(1).normal(size=(N, DIM))
        words[TWINS : 2 * TWINS] -= 0.5 * words[:TWINS]  # captions of twins say different things
        self.words = unit(words)

    def folder(self, suite: Suite) -> Path | None:
        return self.kept

    def key(self, suite: Suite, adapter: str | None) -> list[str]:
        return [suite.digest(), f"image {self.sight[adapter]}"]

    def images(self, items: list[Item], adapter: str | None, label: str = "") -> np.ndarray:
        self.embedded += len(items)
        return unit(np.stack([self._image(_number(item.text), self.sight[adapter]) for item in items]))

    def texts(self, texts: list[str], adapter: str | None, label: str = "") -> np.ndarray:
        return self.words[[_number(text) for text in texts]]

    def _image(self, number: int, sight: float) -> np.ndarray:
        if number >= 2 * TWINS:
            return self.words[number]
        twin = (number + TWINS) % (2 * TWINS)
        own, other = self.words[number], self.words[twin]
        return (own + other) + 0.2 * sight * (own - other)


def _number(text: str) -> int:
    return int(text.split()[-1])


def suite(count: int = N) -> Suite:
    return fresh_suite(sample_rows(count, texts=[f"kind{n} shape{n} {n}" for n in range(count)]))


def pair_names(pairs: Any) -> set[tuple[int, ...]]:
    return {tuple(sorted((_number(pair.first.text), _number(pair.second.text)))) for pair in pairs}


def test_pairs_are_images_that_look_alike_and_whose_captions_differ() -> None:
    asked = suite()
    pairs = hard_pairs(GivenVectors({None: 0.1}), asked)  # type: ignore[arg-type]
    assert pair_names(pairs) == {(n, n + TWINS) for n in range(TWINS)}
    assert all(pair.image_similarity > 0.9 and pair.text_similarity < 0.1 for pair in pairs)


def test_copies_of_one_image_and_captions_of_the_same_words_are_no_pairs() -> None:
    images = unit(np.random.default_rng(0).normal(size=(40, DIM)))
    texts = unit(np.random.default_rng(2).normal(size=(40, DIM)))
    images[1] = unit((images[0] + 0.05 * images[9])[None])[0]
    items = [Item(f"i{n}", f"word{n} thing{n}", "", "", f"s{n}", bytes) for n in range(40)]

    def found(images: np.ndarray, items: list[Item], texts: np.ndarray = texts) -> bool:
        return ("i0", "i1") in {(pair.first.id, pair.second.id) for pair in mine_pairs(items, images, texts)}

    texts[1] = -texts[0]
    assert found(images, items)
    copies = images.copy()
    copies[1] = copies[0]
    assert not found(copies, items), "no model can tell a copy from its original"
    same_words = [Item("i0", "the red fox", "", "", "s0", bytes), Item("i1", "fox, red", "", "", "s1", bytes)]
    assert not found(images, [*same_words, *items[2:]])
    one_image = [items[0], Item("i1", "word1 thing1", "", "", "s0", bytes)]
    assert not found(images, [*one_image, *items[2:]])
    near_texts = texts.copy()
    near_texts[1] = near_texts[0]
    assert not found(images, items, near_texts), "to the text tower both say the same"


def test_an_item_is_in_one_pair_at_most_and_a_broken_model_has_none() -> None:
    images, texts = (unit(np.random.default_rng(seed).normal(size=(200, 8))) for seed in (3, 4))
    items = [Item(f"i{n}", f"word{n} thing{n}", "", "", f"s{n}", bytes) for n in range(200)]
    pairs = mine_pairs(items, images, texts)
    members = [item.id for pair in pairs for item in (pair.first, pair.second)]
    assert len(members) == len(set(members)) > 20
    cosines = [pair.image_similarity for pair in pairs]
    assert cosines == sorted(cosines, reverse=True)
    assert mine_pairs(items, np.full_like(images, np.nan), texts) == []


def test_a_pair_is_right_only_where_both_images_find_their_own_caption() -> None:
    a, b = unit(np.array([[1.0, 0.2], [1.0, 0.2], [1.0, 0.2]])), unit(np.array([[0.2, 1.0], [1.0, 0.3], [1.0, 0.2]]))
    captions = np.tile(np.float32([1, 0]), (3, 1)), np.tile(np.float32([0, 1]), (3, 1))
    assert told_apart((a, b), captions).tolist() == [True, False, False]
    tied = np.float32([[1, 1]]) / np.sqrt(np.float32(2))
    assert told_apart((tied, tied), (captions[0][:1], captions[1][:1])).tolist() == [False], "a tie is not right"


def test_pair_accuracy_tells_who_sees_more_and_keeps_what_it_computed(tmp_path: Path) -> None:
    scorer: Any = GivenVectors({None: 0.1, "clip-blind": -1.0, "clip-sharp": 1.0}, tmp_path)
    asked = suite()
    found = pair_accuracy(scorer, asked, "clip-sharp", "clip-blind")
    assert found is not None
    assert (found.n, found.base, found.score.before, found.score.after) == (TWINS, 1.0, 1.0, 0.0)
    assert (found.worsened, found.improved) == (TWINS, 0) and found.score.ci_high < 0
    assert all(each.right_before for each in found.shown) and 0 < len(found.shown) < TWINS
    assert {image.sample for each in found.shown for image in (each.first, each.second)} <= {
        item.sample_id for item in asked.items()
    }, "a sample of the store is named, and nothing of it is kept"
    assert all(not image.text + image.thumbnail for each in found.shown for image in (each.first, each.second))
    before = scorer.embedded
    assert pair_accuracy(scorer, asked, "clip-sharp", "clip-blind") == found
    assert scorer.embedded == before


def test_a_suite_with_few_such_pairs_has_no_pair_accuracy() -> None:
    assert pair_accuracy(GivenVectors({None: 0.1}), suite(8), None, None) is None  # type: ignore[arg-type]


def test_the_shift_of_a_tower_is_zero_where_it_did_not_move() -> None:
    scorer: Any = GivenVectors({None: 0.1, "clip-a": 0.1, "clip-b": 5.0})
    retention = suite().model_copy(update={"role": "retention"})
    shift = feature_shift(scorer, [retention, suite()], "clip-a", "clip-b")
    assert shift is not None
    image, text = shift.towers["image"], shift.towers["text"]
    assert image.n == N and image.from_base > 0.001
    assert image.from_base == pytest.approx(image.from_incumbent), "the incumbent is where the base is"
    assert (text.from_base, text.from_incumbent) == pytest.approx((0.0, 0.0), abs=1e-6)
    assert text.rank_after == pytest.approx(text.rank_before)
    assert shift.gap_before != shift.gap_after
    assert feature_shift(scorer, [suite()], None, "clip-b") is None, "new data are meant to move"


def test_shift_and_gap_of_known_vectors() -> None:
    east, north = np.float32([[1, 0], [1, 0]]), np.float32([[0, 1], [0, 1]])
    assert (mean_shift(east, east), mean_shift(east, north), mean_shift(east, -east)) == (0.0, 1.0, 2.0)
    assert modality_gap(east, north) == pytest.approx(np.sqrt(2)) and modality_gap(east, east) == 0.0


def closed_suite(answers: list[str]) -> Suite:
    rows = question_rows(len(answers))
    return fresh_suite(rows.set_column(rows.column_names.index("answer"), "answer", [answers]), family="vlm")


def test_the_share_of_yes_is_of_yes_no_questions_alone() -> None:
    asked = closed_suite(["yes"] * 10 + ["no"] * 30 + ["a fox"] * 20)
    right = [item.answers[0] for item in asked.items()]
    share = yes_share(asked, right, ["yes, it is"] * 60, ["No."] * 60)
    assert share == YesShare(40, truth=0.25, base=0.25, before=1.0, after=0.0)
    assert yes_share(closed_suite(["yes"] * 19 + ["red"] * 40), *[["yes"] * 59] * 3) is None


class GivenDiagnostics:
    """An evaluator that has compared already."""

    def __init__(self, found: Diagnostics | Exception) -> None:
        self.found = found

    def diagnostics(self, *_: Any) -> Diagnostics:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def diagnosed(found: Diagnostics | Exception) -> Diagnostics:
    evaluator: Any = GivenDiagnostics(found)
    some: Any = ["a suite"]
    return diagnose(evaluator, some, None, "vlm-a", None)


@pytest.mark.parametrize(
    ("before", "after", "warned"),
    [
        (0.5, 0.65, True),
        (0.5, 0.35, True),
        (0.5, 0.58, False),
        (0.8, 0.75, False),
        (0.8, 0.35, False),
        (0.7, 0.9, True),
    ],
)
def test_a_share_of_yes_that_leaves_the_truth_is_a_warning(before: float, after: float, warned: bool) -> None:
    found = diagnosed(Diagnostics(yes={"presence": YesShare(100, 0.5, 0.5, before, after)}))
    assert bool(found.warnings) == warned
    assert all("presence" in each and "50%" in each for each in found.warnings)


def test_what_cannot_be_computed_is_a_warning_and_ends_no_gate_run() -> None:
    assert "out of memory" in diagnosed(RuntimeError("out of memory")).warnings[0]


def test_pictures_of_a_folder_are_shown_with_the_pair(tmp_path: Path) -> None:
    asked = suite()
    items = [replace(item, source=f"/{n}.png", read=partial(picture, n)) for n, item in enumerate(asked.items())]
    asked._items = tuple(items)
    scorer: Any = GivenVectors({None: 0.1, "clip-blind": -1.0}, tmp_path)
    found = pair_accuracy(scorer, asked, None, "clip-blind")
    assert found is not None
    assert all(each.first.thumbnail.startswith("data:image/jpeg") and each.second.text for each in found.shown)
