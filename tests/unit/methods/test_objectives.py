"""The papers' objectives, each against a plain sum over floats, and their intended effects."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor
from torch.nn import functional as F

from core.errors import ConfigError
from ratchet_methods.objectives.backward_compatible import BackwardCompatible
from ratchet_methods.objectives.compatible_momentum_contrast import CompatibleMomentumContrast
from ratchet_methods.objectives.language_guided import LanguageGuided
from ratchet_methods.objectives.off_diagonal_distillation import OffDiagonalDistillation
from ratchet_methods.objectives.random_text_distillation import NAME, RandomTextDistillation, random_texts
from ratchet_methods.objectives.subcaptions import Subcaptions, split
from ratchet_methods.objectives.supervised_contrast import SupervisedContrast
from ratchet_methods.objectives.swapped_distillation import SwappedDistillation
from ratchet_methods.objectives.swapped_token_distillation import SwappedTokenDistillation
from ratchet_methods.objectives.topology_preservation import TopologyPreservation
from serving.engines.clip_base import ClipBase
from tests.unit.updater.builders import COLOURS, batch, pairs, recipe
from tests.unit.updater.plain_rows import (
    Rows,
    columns,
    contrast,
    cross_entropy,
    dots,
    kl,
    mean_kl,
    softmax,
    without_diagonal,
)
from updater.data.pools import Pair, caption_number
from updater.families.clip_learner import ClipLearner
from updater.methods import objectives
from updater.methods.batches import AnswerBatch, AuxiliaryTexts, Features, TeacherFeatures, summarise
from updater.methods.objectives import ContrastiveDistillation
from updater.recipes import Term, load_recipe


def with_texts(made: Features, name: str, count: int = 6, teacher: str = "incumbent") -> Features:
    other = batch(list(range(count)), seed=50)
    texts = AuxiliaryTexts(other.image, {teacher: other.text.detach()}, torch.full((count,), -1), torch.arange(count))
    return replace(made, texts={name: texts})


def as_classes(base: ClipBase, texts: list[str]) -> Tensor:
    with torch.no_grad():
        return F.normalize(base.build_model().encode_text(base.tokenizer()(texts)), dim=1)


@pytest.mark.parametrize("captions", [[0, 1, 2, 3], [0, 1, 0], [0, 0]])
def test_backward_compatibility_equals_the_plain_sum(captions: list[int]) -> None:
    made = batch(captions)
    old, new = made.teachers["incumbent"], dots(made.image, made.text, made.scale)

    def others(scores: Rows) -> Rows:
        return [[score for j, score in enumerate(row) if captions[j] != captions[i]] for i, row in enumerate(scores)]

    image = contrast(dots(made.image, old.text, made.scale), captions, captions, others(new))
    text = contrast(dots(made.text, old.image, made.scale), captions, captions, others(columns(new)))
    found = BackwardCompatible()(made)
    assert found.item() == pytest.approx((image + text) / 2, rel=1e-5)
    found.backward()
    assert all(side.grad is not None and bool(side.grad.isfinite().all()) for side in (made.image, made.text))


@pytest.mark.parametrize("captions", [[0, 1, 2], [0, 1, 1]])
def test_momentum_contrast_equals_the_plain_sum_over_batch_and_queue(captions: list[int]) -> None:
    term = CompatibleMomentumContrast(temperature=0.5, queue=4)
    earlier, made = batch([2, 7, 0], seed=5), batch(captions)
    keys, numbers = made.teachers["momentum"], list(captions)
    for queued in (False, True):
        if queued:
            term.stepped(earlier)
            old = earlier.teachers["momentum"]
            keys = TeacherFeatures(torch.cat([keys.image, old.image]), torch.cat([keys.text, old.text]))
            numbers += [2, 7, 0]
        image = contrast(dots(made.image, keys.text, 2), captions, numbers)
        text = contrast(dots(made.text, keys.image, 2), captions, numbers)
        assert term(made).item() == pytest.approx((image + text) / 2, rel=1e-5)


def test_the_queue_forgets_the_oldest_and_is_remembered_whole() -> None:
    term = CompatibleMomentumContrast(queue=5)
    assert term.state() == {}
    steps = [batch([3 * n, 3 * n + 1, 3 * n + 2], seed=n) for n in range(3)]
    for made in steps:
        term.stepped(made)
    assert term.state()["caption"].tolist() == [6, 7, 8, 3, 4]
    assert torch.equal(term.state()["text"][:3], steps[2].teachers["momentum"].text)
    again, smaller = CompatibleMomentumContrast(queue=5), CompatibleMomentumContrast(queue=2)
    again.load_state(term.state())
    smaller.load_state(term.state())
    assert again(steps[0]).item() == term(steps[0]).item()
    assert smaller.state()["caption"].tolist() == [6, 7]


def test_the_momentum_model_of_a_learner_lags_between_student_and_start(base: ClipBase) -> None:
    plan = recipe("ctp", objectives=[{"name": "compatible_momentum_contrast", "options": {"keep": 0.5, "new": 0.25}}])
    learner = ClipLearner(base, plan, {}, seed=0)
    learner.prepare(pairs("car", 6), ["new"] * 6)
    start = {name: value.detach().clone() for name, value in learner.parameters.items()}
    learner.forward_backward(range(6))
    learner.optimizer_step(0.1)
    for name, value in learner.parameters.items():
        expected = 0.75 * start[name] + 0.25 * value.detach()
        assert learner.momentum is not None and torch.allclose(learner.momentum.values[name], expected, atol=1e-6)
    features, first = learner.batch(range(6)), learner.objectives[0][1].state()
    momentum = features.teachers["momentum"].image
    assert not torch.allclose(momentum, features.image, atol=1e-4), "it lags"
    assert not torch.allclose(momentum, first["image"], atol=1e-4), "and moves"
    assert not momentum.requires_grad


@pytest.mark.parametrize("teacher", ["base", "incumbent"])
def test_contrastive_distillation_equals_the_plain_sum(teacher: str) -> None:
    made = batch([0, 1, 2, 3, 3])
    old, new = (dots(side.image, side.text, made.scale / 3) for side in (made.teachers[teacher], made))
    expected = 9 * (cross_entropy(old, new) + cross_entropy(columns(old), columns(new)))
    assert float(ContrastiveDistillation(3.0, teacher)(made)) == pytest.approx(expected, rel=1e-5)


def test_images_are_compared_with_frozen_captions_of_the_whole_reference_as_well() -> None:
    new, objective = batch([0, 1, 2, 2]), ContrastiveDistillation(temperature=3.0, captions=2)
    parts = ["new", *["reference"] * 4]
    wanted = objective.further_texts(["a new one", "A car", "a tree", "a car ", "a house"], [], parts)
    assert wanted == [(-1, "a car"), (-1, "a tree")] and objective.frozen_texts
    with_captions = with_texts(new, "contrastive_distillation", teacher="base")
    old, sharpness = new.teachers["base"], new.scale / 3.0
    frozen = with_captions.texts["contrastive_distillation"].teachers["base"]
    before, after = (dots(side.image, torch.cat([side.text, frozen]), sharpness) for side in (old, new))
    texts = cross_entropy(*(columns(dots(side.image, side.text, sharpness)) for side in (old, new)))
    assert float(objective(with_captions)) == pytest.approx(9 * (cross_entropy(before, after) + texts), rel=1e-5)


def test_random_text_distillation_equals_the_plain_sum() -> None:
    made = with_texts(batch([0, 1, 2]), NAME)
    old = dots(made.teachers["incumbent"].image, made.texts[NAME].teachers["incumbent"], made.scale / 2)
    new = dots(made.image, made.texts[NAME].text, made.scale / 2)
    assert float(RandomTextDistillation()(made)) == pytest.approx(4 * cross_entropy(old, new), rel=1e-5)


def test_random_texts_follow_the_seed_and_have_as_many_tokens_as_asked() -> None:
    texts = random_texts(20, 7, seed=1)
    assert texts == random_texts(20, 7, seed=1) != random_texts(20, 7, seed=2)
    assert len(set(texts)) == 20
    assert {len(SimpleTokenizer().encode(text)) for text in texts} == {7}
    assert RandomTextDistillation(20, 7, 1).further_texts(["a car"], [], ["new"]) == [(-1, text) for text in texts]


def off_diagonal(old: Rows, new: Rows) -> float:
    """Summed over the rows that the teacher got right."""
    rows = zip(old, without_diagonal(old), without_diagonal(new), strict=True)
    return sum(kl(x, y) for i, (row, x, y) in enumerate(rows) if max(row) == row[i])


def test_off_diagonal_distillation_equals_the_plain_sum_without_rows_that_were_wrong() -> None:
    made = batch([0, 1, 2, 3, 4, 5], seed=3)
    teacher = made.teachers["incumbent"]
    teacher.text[1:4] = F.normalize(teacher.image[1:4] + 0.3 * teacher.text[1:4], dim=1)
    old, new = dots(teacher.image, teacher.text), dots(made.image, made.text)
    wrong = sum(max(row) != row[i] for rows in (old, columns(old)) for i, row in enumerate(rows))
    assert 0 < wrong < 12, "some rows of either kind"
    expected = (off_diagonal(old, new) + off_diagonal(columns(old), columns(new))) / 12
    assert float(OffDiagonalDistillation()(made)) == pytest.approx(expected, rel=1e-5)


def test_the_shipped_strength_of_mod_x_is_that_of_the_published_code() -> None:
    """Alpha 20, cosines, and the sum over the 64 rows of a batch; it was some 16 times as strong."""
    made = batch(list(range(64)), seed=3)
    teacher = made.teachers["incumbent"]
    teacher.text[:] = F.normalize(teacher.image + 0.01 * teacher.text, dim=1)
    old, new = dots(teacher.image, teacher.text), dots(made.image, made.text)
    both = off_diagonal(old, new) + off_diagonal(columns(old), columns(new))
    term = next(t for t in load_recipe("mod-x").objectives if t.name == "off_diagonal_distillation")
    assert term.weight * float(OffDiagonalDistillation()(made)) == pytest.approx(20 * both / 2, rel=1e-4)


def test_off_diagonal_distillation_leaves_what_belongs_together_to_the_contrast() -> None:
    """Two equal captions: all four of their pairs are positives, and a batch of one caption has nothing to keep."""
    made = batch([0, 0, 1])
    positive = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    old = made.teachers["incumbent"]
    alike = replace(made, teachers={"incumbent": TeacherFeatures(old.image, old.image.clone())})
    scores = old.image @ old.image.T
    new = (made.image @ made.text.T).detach()
    expected = [
        kl(x[~keep].tolist(), y[~keep].tolist())
        for rows in (new, new.T)
        for x, y, keep in zip(scores, rows, positive, strict=True)
    ]
    assert float(OffDiagonalDistillation()(alike)) == pytest.approx(sum(expected) / 6, rel=1e-5)
    nothing = batch([0, 0, 0])
    value = OffDiagonalDistillation()(nothing)
    value.backward()
    assert float(value) == 0 and not nothing.image.grad.any() and not nothing.text.grad.any()


def test_topology_preservation_equals_the_plain_sum_and_one_row_has_none() -> None:
    made = batch([0, 1, 2, 2])
    old, objective = made.teachers["incumbent"], TopologyPreservation(temperature=0.25)
    across = dots(old.image, old.text, 4), dots(made.image, made.text, 4)
    image = dots(old.image, old.image, 4), dots(made.image, made.image, 4)
    text = dots(old.text, old.text, 4), dots(made.text, made.text, 4)
    between = mean_kl(*across) + mean_kl(columns(across[0]), columns(across[1]))
    within = sum(mean_kl(without_diagonal(before), without_diagonal(after)) for before, after in (image, text))
    assert float(objective(made)) == pytest.approx((between + within) / 2, rel=1e-5)
    assert float(objective(made.select([2]))) == 0


def exchanged(row: list[float], right: list[int]) -> list[float]:
    """The row with its largest value moved to the best correct position."""
    top, best = max(range(len(row)), key=row.__getitem__), max(right, key=row.__getitem__)
    swapped = list(row)
    if top not in right:
        swapped[top], swapped[best] = row[best], row[top]
    return swapped


def test_a_swap_gives_the_right_one_the_largest_value_and_leaves_all_others() -> None:
    captions = [0, 1, 2, 2]
    made = batch(captions)
    teacher, right = made.teachers["incumbent"], [[j for j in range(4) if captions[j] == c] for c in captions]
    total, wrong = 0.0, 0
    for turn in (list, columns):
        old = turn(dots(teacher.image, teacher.text, made.scale))
        rows = [exchanged(row, own) for row, own in zip(old, right, strict=True)]
        wrong += sum(row != before for row, before in zip(rows, old, strict=True))
        total += cross_entropy(rows, turn(dots(made.image, made.text, made.scale))) / 2
    assert 0 < wrong < 8, "rows of either kind"
    assert float(SwappedDistillation()(made)) == pytest.approx(total, rel=1e-5)


def test_a_token_is_swapped_also_where_the_teacher_kept_no_probability_of_it() -> None:
    made = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(3, 7, generator=made), torch.randn(3, 7, generator=made)
    order = teacher.argsort(dim=1, descending=True).tolist()
    target = [order[0][0], order[1][1], order[2][6]]  # expected; second; the least probable
    swapped = [exchanged(row, [t]) for row, t in zip(teacher.tolist(), target, strict=True)]

    def value(logits: Tensor, kept: int) -> float:
        said, row = {"incumbent": summarise(teacher, kept)}, torch.tensor([0, 0, 1])
        return float(SwappedTokenDistillation()(AnswerBatch(("new",) * 2, logits, torch.tensor(target), row, said)))

    values = [kl(row, own) for row, own in zip(swapped, student.tolist(), strict=True)]
    whole = ((values[0] + values[1]) / 2 + values[2]) / 2
    assert value(student, 7) == pytest.approx(whole, rel=1e-5)
    assert 0 < value(student, 3) <= whole + 1e-6, "with fewer tokens kept it is a lower bound"
    assert value(torch.tensor(swapped), 3) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("labels", [[0, 1, 0, -1, 0], [-1] * 5])
def test_supervised_contrast_equals_the_plain_loop(labels: list[int]) -> None:
    """Without any label, captions are the classes."""
    captions, term = [0, 1, 1, 2, 3], SupervisedContrast(temperature=0.5)
    made = replace(batch(captions), label=torch.tensor(labels))
    named = any(label >= 0 for label in labels)
    term.begin([], ["car", "tree"] if named else [])
    classes = labels if named else captions
    scores, values = without_diagonal(dots(made.image, made.image, 2.0)), []
    for i, own in enumerate(classes):
        mates = [c == own >= 0 for j, c in enumerate(classes) if j != i]
        shares = [math.log(p) for p, mate in zip(softmax(scores[i]), mates, strict=True) if mate]
        values += [-sum(shares) / len(shares)] if shares else []
    assert float(term(made)) == pytest.approx(sum(values) / len(values), rel=1e-5)


LONG = "A red car on a wet road, seen from above. Two men wait; a dog (brown) runs past them!"


@pytest.mark.parametrize(
    ("caption", "shortest", "parts"),
    [
        (LONG, 1, ["A red car on a wet road", "seen from above", "Two men wait", "a dog (brown) runs past them"]),
        ("Version 3.5 of U.S.A.s car, made by hand", 1, ["Version 3.5 of U.S.A.s car", "made by hand"]),
        ("a car, red, a car, on a very wet road", 2, ["a car", "on a very wet road"]),
        ("one caption without an end", 1, []),
        ("one caption with an end.", 1, []),
    ],
)
def test_a_caption_is_split_at_sentences_and_clauses(caption: str, shortest: int, parts: list[str]) -> None:
    assert split(caption, 9, shortest) == parts


def with_parts(captions: list[str], features: Features) -> tuple[Subcaptions, Features, list[str]]:
    """The objective, and the batch with features of all parts; equal parts have equal features."""
    objective = Subcaptions()
    objective.begin(captions, [])
    wanted = objective.further_texts(captions, [], ["new"] * len(captions))
    words, rows = [text for _, text in wanted], torch.tensor([row for row, _ in wanted])
    own = batch(list(range(9)), seed=50).image.detach()
    text = own[[caption_number(word) % 9 for word in words]].requires_grad_()
    parts = AuxiliaryTexts(text, {}, rows, torch.arange(len(rows)))
    return objective, replace(features, texts={"subcaptions": parts}), words


def test_subcaption_contrast_equals_the_plain_sum_and_a_selection_of_rows_keeps_its_own_parts() -> None:
    captions = ["a big tree, in the park", "nothing to split", "in the park, two men wait. a dog runs"]
    objective, made, words = with_parts(captions, batch([0, 1, 2]))
    assert words == ["a big tree", "in the park", "in the park", "two men wait", "a dog runs"]
    contains = [{0, 1, 2}, set(), {1, 2, 3, 4}]
    scores = dots(made.image, made.texts["subcaptions"].text, made.scale)
    images = texts = 0.0
    for i in (0, 2):
        shares = softmax(scores[i])
        images -= sum(math.log(shares[j]) for j in contains[i]) / len(contains[i]) / 2
    for j, column in enumerate(columns(scores)):
        owners = [math.log(softmax(column)[i]) for i in range(3) if j in contains[i]]
        texts -= sum(owners) / len(owners) / 5
    assert float(objective(made)) == pytest.approx((images + texts) / 2, rel=1e-5)
    alone, few, _ = with_parts(captions[1:], batch([0, 1, 2]).select([1, 2]))
    assert float(objective(made.select([1, 2]))) == pytest.approx(float(alone(few)), rel=1e-5)


def test_language_guided_supervision_equals_the_plain_sum_over_labelled_rows() -> None:
    objective = LanguageGuided()
    wanted = objective.further_texts(["x"], ["car", "tree"], ["new"])
    assert wanted == [(-1, "a photo of a car."), (-1, "a photo of a tree.")]
    made = replace(batch([0, 1, 2, 3]), label=torch.tensor([1, -1, 0, 1]))
    made = with_texts(made, "language_guided", 2, "base")
    scores = dots(made.image, made.texts["language_guided"].teachers["base"], made.scale)
    value = objective(made)
    value.backward()
    assert float(value) == pytest.approx(contrast(scores, made.label.tolist(), [0, 1]), rel=1e-5)
    assert [bool(row.any()) for row in made.image.grad] == [True, False, True, True]
    assert made.text.grad is None or not made.text.grad.any()


def test_without_any_label_captions_are_the_classes() -> None:
    objective, labelled = LanguageGuided(), LanguageGuided()
    assert objective.further_texts(["A car", "a tree", "a car "], [], ["new"] * 3) == [(-1, "a car"), (-1, "a tree")]
    car, tree = caption_number("a car"), caption_number("A tree")
    made = with_texts(batch([car, tree, car]), "language_guided", 2, "base")
    labelled.further_texts([], ["a car", "a tree"], [])
    assert float(objective(made)) == float(labelled(replace(made, label=torch.tensor([0, 1, 0]))))


def test_a_batch_that_says_nothing_to_a_term_is_a_step_like_others() -> None:
    alone_in_their_class, no_label_here = SupervisedContrast(), LanguageGuided()
    alone_in_their_class.begin([], [])
    no_label_here.further_texts(["x"], ["car"], ["new"])
    for term in (alone_in_their_class, no_label_here, Subcaptions()):
        made = with_texts(batch([0, 1, 2]), "language_guided", 1, "base")
        value = term(made)
        value.backward()
        assert float(value.detach()) == 0 and made.image.grad is not None and not bool(made.image.grad.any())


def test_targets_stay_the_bases_own_and_images_move_to_them(base: ClipBase) -> None:
    learner = ClipLearner(base, recipe("language-guided", objectives=[{"name": "language_guided"}]), {}, seed=0)
    examples = [Pair(p.id, p.text, p.read, COLOURS[i % 6]) for i, p in enumerate(pairs("car", 12))]
    learner.prepare(examples, ["new"] * 12)
    rows = list(range(12))

    def targets() -> Tensor:
        return learner.batch(rows).texts["language_guided"].teachers["base"]

    first, values = targets().clone(), []
    assert torch.allclose(first, as_classes(base, [f"a photo of a {each}." for each in sorted(COLOURS)]), atol=1e-5)
    for step in range(8):
        values.append(learner.forward_backward(rows)[0])
        learner.optimizer_step(1e-2, step, 8)
    assert values[-1] < values[0] and torch.equal(targets(), first)
    assert all(p.grad is None or not p.grad.any() for n, p in learner.parameters.items() if "visual" not in n)


def test_sub_captions_of_a_batch_are_of_its_own_rows(base: ClipBase) -> None:
    """The features of a part are those of the same words as a caption."""
    learner = ClipLearner(base, recipe("dreamlip"), {}, seed=0)
    words = ["a red car, a wet road", "nothing", "a tall tree. two men wait"]
    examples = [Pair(p.id, text, p.read) for p, text in zip(pairs("car", 3), words, strict=True)]
    learner.prepare(examples, ["new"] * 3)
    texts = learner.batch([2, 1]).texts["subcaptions"]
    assert (texts.row.tolist(), texts.number.tolist()) == ([0, 0], [2, 3])
    assert torch.allclose(texts.text, as_classes(base, ["a tall tree", "two men wait"]), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("compatible_momentum_contrast", {"queue": 0}, "queue is 0"),
        ("compatible_momentum_contrast", {"keep": 0.9, "new": 0.2}, "keep and new add up to 1.1"),
        ("contrastive_distillation", {"temperature": 0.0}, "temperature is 0"),
        ("topology_preservation", {"temperature": -1.0}, "temperature is -1"),
        ("random_text_distillation", {"count": 0}, "count is 0"),
        ("backward_compatible", {"teacher": "momentum"}, "teacher is 'momentum'"),
        ("contrastive_distillation", {"teacher": "momentum"}, "teacher is 'momentum'"),
        ("feature_distillation", {"replay": "momentum"}, "teacher is 'momentum'"),
        ("subcaptions", {"most": 0}, "at least 1"),
        ("language_guided", {"template": "a photo"}, "template"),
        ("self_distillation", {"keep": 1.1}, "keep is 1.1"),
    ],
)
def test_an_option_without_a_meaning_is_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*{said}"):
        objectives.build([Term(name=name, options=options)], "vlm" if name == "self_distillation" else "clip")
