"""A suite's result by how often its concepts were seen in the training data of the sample store."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.samples import TOPIC, put, sample
from tests.unit.gate.builders import fresh_suite, outcomes, question_rows, sample_rows
from updater.gate.decision import Scores
from updater.gate.diagnostics import (
    Counts,
    StoreCounts,
    concept_of,
    content_words,
    count_terms,
    interval,
    measure_tail,
)
from updater.gate.suite_items import Item
from updater.gate.suites import Suite

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
    assert counts_in(tmp_path, CAPTIONS, concepts) == [2, 2, 2, 1, 0, 0]


def test_words_of_the_concept_and_the_label_of_a_sample_count_too(tmp_path: Path) -> None:
    assert counts_in(tmp_path, ["a thing"] * 3, ["flag ao", "wild cat"], concept="flag ao", label="wild_cat") == [3, 3]


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
