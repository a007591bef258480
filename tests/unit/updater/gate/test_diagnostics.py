from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.samples import TOPIC, put, sample
from tests.unit.updater.gate.builders import fresh_suite, outcomes, picture, question_rows, sample_rows
from updater.gate import diagnostics as d
from updater.gate.decision import Scores
from updater.gate.run import diagnose
from updater.gate.suite_items import Item
from updater.gate.suites import Suite
from updater.gate.verdict import Diagnostics, YesShare

CAPTIONS = ["A red fox.", "the fox, red and asleep", "a red car", "An OWL", "foxes"]


def counter(home: Path, captions: Iterable[str], having: Any = "text", **fields: Any) -> d.StoreCounts:
    """Counts over captions, beside a held-out sample and a question."""
    store = SampleStore(str(home / "lake"))
    rows = [sample(0, n, text=text, **fields) for n, text in enumerate(captions)]
    rows += [sample(0, 900, text="a red fox", split="fresh_eval"), sample(0, 901, text="", question="a red fox?")]
    return d.StoreCounts(store, put(store, rows, Position(TOPIC, 0, 902)), having, home / "cache")


def test_a_sample_counts_that_has_all_words_of_a_concept_in_any_order(tmp_path: Path) -> None:
    concepts = ["red fox", "fox red", "a fox", "the owl", "red owl", "wolf", "!?"]
    seen = counter(tmp_path / "captions", CAPTIONS)(concepts)
    assert [seen[concept] for concept in concepts] == [2, 2, 2, 1, 0, 0, 0]
    seen = counter(tmp_path / "own", ["a thing"] * 3, concept="flag ao", label="wild_cat")(["flag ao", "wild cat"])
    assert (seen["flag ao"], seen["wild cat"]) == (3, 3)
    assert counter(tmp_path / "none", [])(["red fox"]).rows == 0, "held-out samples do not count"
    assert counter(tmp_path / "asked", CAPTIONS, "question")(["red fox"])["red fox"] == 1, "nor another family's"
    assert d.content_words("The A") == {"the", "a"}, "words of nothing but articles"


def suite_of(texts: list[str], concepts: list[str]) -> Suite:
    rows = sample_rows(len(texts), texts=texts)
    return fresh_suite(rows.set_column(rows.column_names.index("concept"), "concept", [concepts]))


def test_an_item_shows_its_class_its_concept_or_what_it_says() -> None:
    caption, item = Suite(name="c", task="retrieval"), Item("i", "a caption", "k", "n", "s", bytes)
    classes = Suite(name="k", task="classification", names={"n02": "red fox"})
    question, asked = Suite(name="q", task="vqa"), replace(item, text="what is it?")
    assert [d.concept_of(caption, each) for each in (item, replace(item, concept="fox"))] == ["a caption", "fox"]
    assert d.concept_of(classes, replace(item, text="n02", concept="animal")) == "red fox"
    answers = [(("a fox",), ""), (("yes",), ""), (("yes",), "red fox")]
    shown = [d.concept_of(question, replace(asked, answers=given, concept=concept)) for given, concept in answers]
    assert shown == ["a fox", "what is it?", "red fox"]


def test_a_loss_among_what_was_never_seen_shows_in_its_bin_alone() -> None:
    suite = suite_of([f"number {n}" for n in range(200)], ["rare"] * 60 + ["common"] * 140)
    rare = np.array([item.concept == "rare" for item in suite.items()])
    before = np.ones((200, 2))
    after = np.where(rare[:, None] & (np.arange(200) % 2 == 0)[:, None], 0.0, before)
    scores = Scores(suite, outcomes(before), outcomes(before), outcomes(after), clusters=suite.clusters())
    tail = d.measure_tail([scores], lambda _: d.Counts({d.content_words("common"): 100}, 5000, 5000))
    assert tail is not None
    never, often = tail.suites[suite.name]
    assert (never.name, never.n, often.name, often.n, often.units) == ("never", 60, "100+", 140, 140)
    lost = float((before - after)[rare].mean())
    assert never.score.difference == pytest.approx(-lost) and never.score.after == pytest.approx(1 - lost)
    assert never.score.ci_low < -lost < never.score.ci_high < 0
    assert often.score.difference == 0 and often.score.ci_low < 0 < often.score.ci_high
    assert d.measure_tail([scores], lambda _: d.Counts({}, 0, 0)) is None, "nothing was trained on"

    moves = np.repeat(np.random.default_rng(0).choice([0.0, 1.0], 20), 10)
    alone, together = (d.interval(np.zeros(200), moves, c, 0) for c in (None, np.repeat(np.arange(20), 10)))
    assert together.ci_high - together.ci_low > 2 * (alone.ci_high - alone.ci_low), "items that move together"


@pytest.mark.parametrize(("count", "name"), [(0, "never"), (1, "1-9"), (9, "1-9"), (10, "10-99"), (100, "100+")])
def test_bins_begin_where_their_names_say(count: int, name: str) -> None:
    suite, one = suite_of(["x", "y"], ["fox", "fox"]), outcomes(np.ones((2, 2)))
    tail = d.measure_tail([Scores(suite, one, one, one)], lambda _: d.Counts({d.content_words("fox"): count}, 200, 200))
    assert tail is not None and [each.name for each in tail.suites[suite.name]] == [name]


N, DIM, TWINS = 80, 64, 12
"""Items; the first TWINS of them look like the next TWINS."""


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


class GivenVectors:
    """A scorer whose models know every text and see only part of what distinguishes twins."""

    def __init__(self, sight: dict[str | None, float], folder: Path | None = None) -> None:
        """``sight``: by model, the visible part of the difference between twins, from -1 (the wrong way) to 1."""
        self.sight, self.cache, self.embedded = sight, folder, 0
        words = np.random.default_rng(1).normal(size=(N, DIM))
        words[TWINS : 2 * TWINS] -= 0.5 * words[:TWINS]  # captions of twins say different things
        self.words = unit(words)

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
        own, other = self.words[number], self.words[(number + TWINS) % (2 * TWINS)]
        return (own + other) + 0.2 * sight * (own - other)


def _number(text: str) -> int:
    return int(text.split()[-1])


def suite(count: int = N) -> Suite:
    return fresh_suite(sample_rows(count, texts=[f"kind{n} shape{n} {n}" for n in range(count)]))


def test_pairs_are_images_that_look_alike_and_whose_captions_differ_and_no_copies() -> None:
    pairs = d.hard_pairs(GivenVectors({None: 0.1}), suite())  # type: ignore[arg-type]
    found = {tuple(sorted((_number(pair.first.text), _number(pair.second.text)))) for pair in pairs}
    assert found == {(n, n + TWINS) for n in range(TWINS)}
    assert all(pair.image_similarity > 0.9 and pair.text_similarity < 0.1 for pair in pairs)
    assert d.pair_accuracy(GivenVectors({None: 0.1}), suite(8), None, None) is None, "few pairs"  # type: ignore[arg-type]

    images, texts = (unit(np.random.default_rng(seed).normal(size=(40, DIM))) for seed in (0, 2))
    images[1] = unit((images[0] + 0.05 * images[9])[None])[0]
    texts[1] = -texts[0]
    items = [Item(f"i{n}", f"word{n} thing{n}", "", "", f"s{n}", bytes) for n in range(40)]
    copies, near_texts = images.copy(), texts.copy()
    copies[1], near_texts[1] = copies[0], texts[0]
    said = [replace(items[0], text="the red fox"), replace(items[1], text="fox, red"), *items[2:]]
    one_image = [items[0], replace(items[1], source="s0"), *items[2:]]
    for is_pair, *given in (
        (True, items, images, texts),
        (False, items, copies, texts),  # no model can tell a copy from its original
        (False, said, images, texts),  # the same words
        (False, one_image, images, texts),
        (False, items, images, near_texts),  # to the text tower both say the same
        (False, items, images * np.float32(np.nan), texts),  # a broken model
    ):
        assert (("i0", "i1") in {(pair.first.id, pair.second.id) for pair in d.mine_pairs(*given)}) == is_pair  # type: ignore[arg-type]


def test_a_pair_is_right_only_where_both_images_find_their_own_caption() -> None:
    one, other = unit(np.array([[1, 0.2]] * 3 + [[1, 1]])), unit(np.array([[0.2, 1], [1, 0.3], [1, 0.2], [1, 1]]))
    captions = np.tile(np.float32([1, 0]), (4, 1)), np.tile(np.float32([0, 1]), (4, 1))
    assert d.told_apart((one, other), captions).tolist() == [True, False, False, False], "a tie is not right"


def test_pair_accuracy_tells_who_sees_more_and_keeps_what_it_computed(tmp_path: Path) -> None:
    scorer: Any = GivenVectors({None: 0.1, "clip-blind": -1.0, "clip-sharp": 1.0}, tmp_path)
    asked = suite()
    found = d.pair_accuracy(scorer, asked, "clip-sharp", "clip-blind")
    assert found is not None
    assert (found.n, found.base, found.score.before, found.score.after) == (TWINS, 1.0, 1.0, 0.0)
    assert (found.worsened, found.improved) == (TWINS, 0) and found.score.ci_high < 0
    assert all(each.right_before for each in found.shown) and 0 < len(found.shown) < TWINS
    shown = [image for each in found.shown for image in (each.first, each.second)]
    assert {image.sample for image in shown} <= {item.sample_id for item in asked.items()}
    assert all(not image.text + image.thumbnail for image in shown), "a sample of the store is named, and not kept"
    before = scorer.embedded
    assert d.pair_accuracy(scorer, asked, "clip-sharp", "clip-blind") == found and scorer.embedded == before
    folder = [replace(item, source=f"/{n}.png", read=partial(picture, n)) for n, item in enumerate(asked.items())]
    asked._items = tuple(folder)
    found = d.pair_accuracy(scorer, asked, None, "clip-blind")
    assert found is not None
    assert all(each.first.thumbnail.startswith("data:image/jpeg") and each.second.text for each in found.shown)


def test_the_shift_of_a_tower_is_zero_where_it_did_not_move() -> None:
    scorer: Any = GivenVectors({None: 0.1, "clip-a": 0.1, "clip-b": 5.0})
    retention = suite().model_copy(update={"role": "retention"})
    shift = d.feature_shift(scorer, [retention, suite()], "clip-a", "clip-b")
    assert shift is not None
    image, text = shift.towers["image"], shift.towers["text"]
    assert image.n == N and image.from_base > 0.001
    assert image.from_base == pytest.approx(image.from_incumbent), "the incumbent is where the base is"
    assert (text.from_base, text.from_incumbent) == pytest.approx((0.0, 0.0), abs=1e-6)
    assert text.rank_after == pytest.approx(text.rank_before)
    assert shift.gap_before != shift.gap_after
    assert d.feature_shift(scorer, [suite()], None, "clip-b") is None, "new data are meant to move"
    east, north = np.float32([[1, 0], [1, 0]]), np.float32([[0, 1], [0, 1]])
    assert (d.mean_shift(east, east), d.mean_shift(east, north), d.mean_shift(east, -east)) == (0.0, 1.0, 2.0)
    assert d.modality_gap(east, north) == pytest.approx(np.sqrt(2)) and d.modality_gap(east, east) == 0.0


def closed_suite(answers: list[str]) -> Suite:
    rows = question_rows(len(answers))
    return fresh_suite(rows.set_column(rows.column_names.index("answer"), "answer", [answers]), family="vlm")


def test_the_share_of_yes_is_of_yes_no_questions_alone() -> None:
    asked = closed_suite(["yes"] * 10 + ["no"] * 30 + ["a fox"] * 20)
    right = [item.answers[0] for item in asked.items()]
    share = d.yes_share(asked, right, ["yes, it is"] * 60, ["No."] * 60)
    assert share == YesShare(40, truth=0.25, base=0.25, before=1.0, after=0.0)
    assert d.yes_share(closed_suite(["yes"] * 19 + ["red"] * 40), *[["yes"] * 59] * 3) is None


@pytest.mark.parametrize(
    ("before", "after", "warned"),
    [(0.5, 0.65, True), (0.5, 0.35, True), (0.5, 0.58, False), (0.8, 0.35, False), (0.7, 0.9, True)],
)
def test_a_share_of_yes_off_the_truth_and_failures_are_warnings(before: float, after: float, warned: bool) -> None:
    shares = Diagnostics(yes={"presence": YesShare(100, 0.5, 0.5, before, after)})
    evaluator: Any = Mock(diagnostics=Mock(side_effect=[shares, RuntimeError("out of memory")]))
    found, failed = (diagnose(evaluator, ["a suite"], None, "vlm-a", None) for _ in range(2))  # type: ignore[list-item]
    assert bool(found.warnings) == warned
    assert all("presence" in each and "50%" in each for each in found.warnings)
    assert "out of memory" in failed.warnings[0], "it ends no gate run"
