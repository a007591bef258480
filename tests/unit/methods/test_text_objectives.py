"""Objectives with texts of their own: sub-captions, and frozen texts of labels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from ratchet_methods.objectives.language_guided import LanguageGuided
from ratchet_methods.objectives.subcaptions import Subcaptions, split
from serving.engines.clip_base import ClipBase
from tests.unit.updater.builders import COLOURS, batch, pairs, recipe
from updater.data.pools import Pair, caption_number
from updater.families.clip_learner import ClipLearner
from updater.methods.batches import AuxiliaryTexts, Features

LONG = "A red car on a wet road, seen from above. Two men wait; a dog (brown) runs past them!"


def unit(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_a_caption_is_split_at_sentences_and_clauses() -> None:
    assert split(LONG, 9, 1) == [
        "A red car on a wet road", "seen from above", "Two men wait", "a dog (brown) runs past them",
    ]  # fmt: skip
    assert split("Version 3.5 of the car, made in the U.S.A. by hand", 9, 1)[0] == "Version 3.5 of the car"


def test_short_parts_and_repeated_ones_are_left_out() -> None:
    assert split("a car, red, a car, on a very wet road", 9, 2) == ["a car", "on a very wet road"]
    assert split("one caption without an end", 9, 1) == []
    assert split("one caption with an end.", 9, 1) == []


def with_parts(captions: list[str], features: Features, **options: int) -> tuple[Subcaptions, Features, list[str]]:
    """The objective, and the batch with features of all parts; equal parts have equal features."""
    objective = Subcaptions(**options)
    objective.begin(captions, [])
    wanted = objective.further_texts(captions, [], ["new"] * len(captions))
    words = [text for _, text in wanted]
    text = torch.stack([unit(1, 50 + sorted(set(words)).index(word))[0] for word in words]).requires_grad_()
    rows = torch.tensor([row for row, _ in wanted])
    texts = AuxiliaryTexts(text, {}, rows, torch.arange(len(rows)))
    return objective, replace(features, texts={"subcaptions": texts}), words


def test_subcaption_contrast_equals_the_plain_sum() -> None:
    captions = ["a big tree, in the park", "nothing to split", "in the park, two men wait. a dog runs"]
    objective, made, words = with_parts(captions, batch([0, 1, 2]))
    assert words == ["a big tree", "in the park", "in the park", "two men wait", "a dog runs"]
    contains = [{0, 1, 2}, set(), {1, 2, 3, 4}]
    scores = (made.scale * made.image @ made.texts["subcaptions"].text.T).tolist()
    images = texts = 0.0
    for i in (0, 2):
        norm = math.log(sum(math.exp(score) for score in scores[i]))
        images -= sum(scores[i][j] - norm for j in contains[i]) / len(contains[i]) / 2
    for j in range(5):
        norm = math.log(sum(math.exp(scores[i][j]) for i in range(3)))
        owners = [i for i in range(3) if j in contains[i]]
        texts -= sum(scores[i][j] - norm for i in owners) / len(owners) / 5
    assert float(objective(made)) == pytest.approx((images + texts) / 2, rel=1e-5)


def test_captions_without_parts_count_nothing() -> None:
    objective = Subcaptions()
    objective.begin(["a car", "a tree"], [])
    made = batch([0, 1])
    assert objective.further_texts(["a car", "a tree"], [], ["new"] * 2) == []
    value = objective(made)
    value.backward()
    assert float(value) == 0
    assert made.image.grad is not None
    assert float(made.image.grad.abs().max()) == 0


def test_a_selection_of_rows_keeps_its_own_parts() -> None:
    captions = ["a big tree, in the park", "a red house. a small door", "two men wait. a dog runs"]
    objective, made, _ = with_parts(captions, batch([0, 1, 2]))
    alone, few, _ = with_parts(captions[1:], batch([0, 1, 2]).select([1, 2]))
    few = replace(
        few, texts={"subcaptions": replace(few.texts["subcaptions"], text=made.texts["subcaptions"].text[2:])}
    )
    assert float(objective(made.select([1, 2]))) == pytest.approx(float(alone(few)), rel=1e-5)


def guided(objective: LanguageGuided, made: Features, count: int) -> Features:
    texts = AuxiliaryTexts(unit(count, 8), {"base": unit(count, 9)}, torch.full((count,), -1), torch.arange(count))
    return replace(made, texts={"language_guided": texts})


def test_language_guided_supervision_equals_the_plain_sum_over_labelled_rows() -> None:
    objective = LanguageGuided()
    assert objective.further_texts(["x"], ["car", "tree"], ["new"]) == [
        (-1, "a photo of a car."),
        (-1, "a photo of a tree."),
    ]
    made = guided(objective, replace(batch([0, 1, 2, 3]), label=torch.tensor([1, -1, 0, 1])), 2)
    targets = made.texts["language_guided"].teachers["base"].tolist()
    total = 0.0
    for row, label in ((0, 1), (2, 0), (3, 1)):
        image = made.image[row].tolist()
        scores = [made.scale * sum(a * b for a, b in zip(image, target, strict=True)) for target in targets]
        total -= (scores[label] - math.log(sum(math.exp(score) for score in scores))) / 3
    value = objective(made)
    value.backward()
    assert float(value) == pytest.approx(total, rel=1e-5)
    assert made.image.grad is not None
    assert [bool(row.any()) for row in made.image.grad] == [True, False, True, True]
    assert made.text.grad is None or float(made.text.grad.abs().max()) == 0


def test_a_batch_without_labels_among_labelled_ones_counts_nothing() -> None:
    objective = LanguageGuided()
    objective.further_texts(["x"], ["car"], ["new"])
    assert float(objective(guided(objective, batch([0, 1]), 1))) == 0


def test_without_any_label_captions_are_the_classes() -> None:
    objective = LanguageGuided()
    assert objective.further_texts(["A car", "a tree", "a car "], [], ["new"] * 3) == [(-1, "a car"), (-1, "a tree")]
    car, tree = caption_number("a car"), caption_number("A tree")
    made = guided(objective, batch([car, tree, car]), 2)
    labelled = LanguageGuided()
    labelled.further_texts([], ["a car", "a tree"], [])
    assert float(objective(made)) == float(labelled(replace(made, label=torch.tensor([0, 1, 0]))))


def test_targets_stay_the_bases_own_and_images_move_to_them(base: ClipBase) -> None:
    terms = [{"name": "language_guided"}]
    learner = ClipLearner(base, recipe("language-guided", objectives=terms), {}, seed=0)
    examples = [Pair(p.id, p.text, p.read, COLOURS[i % 6]) for i, p in enumerate(pairs("car", 12))]
    learner.prepare(examples, ["new"] * 12)
    rows = list(range(12))
    targets = learner.batch(rows).texts["language_guided"].teachers["base"].clone()
    with torch.no_grad():
        tokens = base.tokenizer()([f"a photo of a {label}." for label in sorted(COLOURS)])
        expected = F.normalize(base.build_model().encode_text(tokens), dim=1)  # type: ignore[operator]
    assert torch.allclose(targets, expected, atol=1e-5)
    values = []
    for step in range(8):
        values.append(learner.forward_backward(rows)[0])
        learner.optimizer_step(1e-2, step, 8)
    assert values[-1] < values[0]
    assert torch.equal(learner.batch(rows).texts["language_guided"].teachers["base"], targets)
    assert all(p.grad is None or not p.grad.any() for n, p in learner.parameters.items() if "visual" not in n)


def test_sub_captions_of_a_batch_are_of_its_own_rows(base: ClipBase) -> None:
    """The features of a part are those of the same words as a caption."""
    learner = ClipLearner(base, recipe("dreamlip"), {}, seed=0)
    words = ["a red car, a wet road", "nothing", "a tall tree. two men wait"]
    examples = [Pair(p.id, text, p.read) for p, text in zip(pairs("car", 3), words, strict=True)]
    learner.prepare(examples, ["new"] * 3)
    texts = learner.batch([2, 1]).texts["subcaptions"]
    assert texts.row.tolist() == [0, 0]
    assert texts.number.tolist() == [2, 3]
    with torch.no_grad():
        tokens = base.tokenizer()(["a tall tree", "two men wait"])
        expected = F.normalize(base.build_model().encode_text(tokens), dim=1)  # type: ignore[operator]
    assert torch.allclose(texts.text, expected, atol=1e-5)
