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
from updater.gate.decision import Scores
from updater.gate.diagnostics import (
    Counts,
    StoreCounts,
    concept_of,
    content_words,
    count_terms,
    feature_shift,
    hard_pairs,
    interval,
    mean_shift,
    measure_tail,
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

CAPTIONS = ["A red fox.", "the fox, red and asleep", "a red car", "An OWL", "foxes"]


def store_of(home: Path, captions: Iterable[str], **fields: Any) -> tuple[SampleStore, int]:
    store = SampleStore(str(home / "lake"))
    rows = [sample(0, n, text=text, **fields) for n, text in enumerate(captions)]
    rows += [sample(0, 900, text="a red fox", split="fresh_eval"), sample(0, 901, text="", question="a red fox?")]
    return store, put(store, rows, Position(TOPIC, 0, 902))


def counts_in(home: Path, captions: Iterable[str], concepts: list[str], **fields: Any) -> list[int]:
    store, version = store_of(home, captions, **fields)
    seen = StoreCounts(store, version, "text")(concepts)
    return [seen[concept] for concept in concepts]


def test_a_sample_counts_that_has_all_words_of_a_concept_in_any_order(tmp_path: Path) -> None:
    concepts = ["red fox", "fox red", "a fox", "the owl", "red owl", "wolf"]
    assert counts_in(tmp_path / "captions", CAPTIONS, concepts) == [2, 2, 2, 1, 0, 0]
    own = {"concept": "flag ao", "label": "wild_cat"}
    assert counts_in(tmp_path / "own", ["a thing"] * 3, ["flag ao", "wild cat"], **own) == [3, 3]


def test_held_out_samples_and_those_of_another_family_do_not_count(tmp_path: Path) -> None:
    store, version = store_of(tmp_path, [])
    assert StoreCounts(store, version, "text")(["red fox"]).rows == 0
    assert StoreCounts(store, version, "question")(["red fox"])["red fox"] == 1


def test_of_more_samples_than_the_bound_every_nth_is_looked_at_and_counts_are_scaled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, version = store_of(tmp_path, ["a fox"] * 100)
    monkeypatch.setattr("updater.gate.diagnostics.MAX_ROWS", 30)
    monkeypatch.setattr("streams.store.sample_store.BATCH_ROWS", 7)
    seen = StoreCounts(store, version, "text")(["fox"])
    assert (seen["fox"], seen.rows, seen.counted) == (100, 100, 25)


def test_what_was_counted_is_kept_for_the_same_version_and_concepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, version = store_of(tmp_path, CAPTIONS)
    first = StoreCounts(store, version, "text", tmp_path / "cache")(["red fox", "owl"])
    monkeypatch.setattr(store, "addresses", lambda *_: pytest.fail("it was counted again"))
    assert StoreCounts(store, version, "text", tmp_path / "cache")(["owl", "red fox"]) == first
    with pytest.raises(pytest.fail.Exception):
        StoreCounts(store, version, "text", tmp_path / "cache")(["red car"])


def test_a_text_of_nothing_but_articles_has_words_and_one_of_marks_has_none() -> None:
    assert content_words("The A") == {"the", "a"}
    assert content_words("!?") == frozenset()
    assert count_terms([frozenset({"fox"})], [frozenset()])[0].tolist() == [0]


def suite_of(texts: list[str], concepts: list[str]) -> Suite:
    rows = sample_rows(len(texts), texts=texts)
    return fresh_suite(rows.set_column(rows.column_names.index("concept"), "concept", [concepts]))


def test_an_item_shows_its_class_its_concept_or_what_it_says() -> None:
    caption, item = Suite(name="c", task="retrieval"), Item("i", "a caption", "k", "n", "s", bytes)
    classes = Suite(name="k", task="classification", names={"n02": "red fox"})
    question = Suite(name="q", task="vqa")

    def asked(answer: str, concept: str = "") -> Item:
        return Item("i", "what is it?", "k", "n", "s", bytes, (answer,), concept)

    assert concept_of(caption, item) == "a caption"
    assert concept_of(classes, Item("i", "n02", "k", "n", "s", bytes, concept="animal")) == "red fox"
    assert [concept_of(question, asked("a fox")), concept_of(question, asked("yes"))] == ["a fox", "what is it?"]
    assert concept_of(question, asked("yes", "red fox")) == "red fox"
    sampled = fresh_suite(question_rows(2), family="vlm")
    assert [concept_of(sampled, each) for each in sampled.items()] == [each.answers[0] for each in sampled.items()]
    assert {concept_of(s, i) for s in [suite_of(["x", "y"], ["red fox", ""])] for i in s.items()} == {"red fox", "y"}


def test_a_loss_among_what_was_never_seen_shows_in_its_bin_alone() -> None:
    texts = [f"number {n}" for n in range(200)]
    suite = suite_of(texts, ["rare"] * 60 + ["common"] * 140)
    rare = np.array([item.concept == "rare" for item in suite.items()])
    before = np.ones((200, 2))
    after = np.where(rare[:, None] & (np.arange(200) % 2 == 0)[:, None], 0.0, before)
    scores = Scores(suite, outcomes(before), outcomes(before), outcomes(after), clusters=suite.clusters())

    def counts(_: Iterable[str]) -> Counts:
        return Counts({content_words("common"): 100}, 5000, 5000)

    tail = measure_tail([scores], counts)
    assert tail is not None
    never, often = tail.suites[suite.name]
    assert (never.name, never.n, often.name, often.n, often.units) == ("never", 60, "100+", 140, 140)
    lost = float((before - after)[rare].mean())
    assert never.score.difference == pytest.approx(-lost) and never.score.after == pytest.approx(1 - lost)
    assert never.score.ci_low < -lost < never.score.ci_high < 0
    assert often.score.difference == 0 and often.score.ci_low < 0 < often.score.ci_high
    assert measure_tail([scores], lambda _: Counts({}, 0, 0)) is None, "nothing was trained on"


@pytest.mark.parametrize(("count", "name"), [(0, "never"), (1, "1-9"), (9, "1-9"), (10, "10-99"), (100, "100+")])
def test_bins_begin_where_their_names_say(count: int, name: str) -> None:
    suite = suite_of(["x", "y"], ["fox", "fox"])
    one = outcomes(np.ones((2, 2)))
    scores = Scores(suite, one, one, one)
    tail = measure_tail([scores], lambda _: Counts({content_words("fox"): count}, 200, 200))
    assert tail is not None and [each.name for each in tail.suites[suite.name]] == [name]


def test_the_interval_of_items_that_move_together_is_wider() -> None:
    rng = np.random.default_rng(0)
    moves = np.repeat(rng.choice([0.0, 1.0], 20), 10)
    before = np.full(200, 0.0)
    alone, together = (interval(before, moves, c, 0) for c in (None, np.repeat(np.arange(20), 10)))
    assert together.ci_high - together.ci_low > 2 * (alone.ci_high - alone.ci_low)


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
        twin = (number + TWINS) % (2 * TWINS)
        own, other = self.words[number], self.words[twin]
        return (own + other) + 0.2 * sight * (own - other)


def _number(text: str) -> int:
    return int(text.split()[-1])


def suite(count: int = N) -> Suite:
    return fresh_suite(sample_rows(count, texts=[f"kind{n} shape{n} {n}" for n in range(count)]))


def test_pairs_are_images_that_look_alike_and_whose_captions_differ() -> None:
    asked = suite()
    pairs = hard_pairs(GivenVectors({None: 0.1}), asked)  # type: ignore[arg-type]
    found = {tuple(sorted((_number(pair.first.text), _number(pair.second.text)))) for pair in pairs}
    assert found == {(n, n + TWINS) for n in range(TWINS)}
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
    assert pair_accuracy(GivenVectors({None: 0.1}), suite(8), None, None) is None, "few pairs"  # type: ignore[arg-type]


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
    folder = [replace(item, source=f"/{n}.png", read=partial(picture, n)) for n, item in enumerate(asked.items())]
    asked._items = tuple(folder)
    found = pair_accuracy(scorer, asked, None, "clip-blind")
    assert found is not None
    assert all(each.first.thumbnail.startswith("data:image/jpeg") and each.second.text for each in found.shown)


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


def diagnosed(found: Diagnostics | Exception) -> Diagnostics:
    evaluator: Any = Mock()
    evaluator.diagnostics.side_effect = [found]
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
