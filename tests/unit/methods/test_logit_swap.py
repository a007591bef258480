"""Logit swaps and supervised contrast against plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ratchet_methods.objectives.supervised_contrast import SupervisedContrast
from ratchet_methods.objectives.swapped_distillation import SwappedDistillation
from ratchet_methods.objectives.swapped_token_distillation import SwappedTokenDistillation
from tests.unit.updater.builders import batch
from tests.unit.updater.plain_rows import columns, cross_entropy, dots, softmax
from updater.methods.batches import AnswerBatch, Features, TeacherFeatures, summarise


def taught(captions: list[int], seed: int = 0) -> Features:
    other = batch(captions, seed=seed + 100)
    return replace(
        batch(captions, seed=seed), teachers={"incumbent": TeacherFeatures(other.image.detach(), other.text.detach())}
    )


def exchanged(row: list[float], right: list[int]) -> list[float]:
    """The row with its largest value on the best of those that are right."""
    top, best = max(range(len(row)), key=row.__getitem__), max(right, key=row.__getitem__)
    swapped = list(row)
    if top not in right:
        swapped[top], swapped[best] = row[best], row[top]
    return swapped


def test_a_swap_gives_the_right_one_the_largest_value_and_leaves_all_others() -> None:
    captions = [0, 1, 2, 2]
    made = taught(captions)
    teacher, right = made.teachers["incumbent"], [[j for j in range(4) if captions[j] == c] for c in captions]
    total, wrong = 0.0, 0
    for turned in (False, True):
        old, new = dots(teacher.image, teacher.text, made.scale), dots(made.image, made.text, made.scale)
        if turned:
            old, new = columns(old), columns(new)
        rows = [exchanged(row, own) for row, own in zip(old, right, strict=True)]
        wrong += sum(row != before for row, before in zip(rows, old, strict=True))
        total += cross_entropy(rows, new) / 2
    assert 0 < wrong < 8, "rows of either kind"
    assert float(SwappedDistillation()(made)) == pytest.approx(total, rel=1e-5)


def answers(student: torch.Tensor, teacher: torch.Tensor, target: list[int], k: int) -> AnswerBatch:
    return AnswerBatch(
        part=("new",) * 2,
        logits=student.requires_grad_(),
        target=torch.tensor(target),
        row=torch.tensor([0, 0, 1]),
        teachers={"incumbent": summarise(teacher, k)},
    )


def test_a_token_is_swapped_also_where_the_teacher_kept_no_probability_of_it() -> None:
    made = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(3, 7, generator=made), torch.randn(3, 7, generator=made)
    order = teacher.argsort(dim=1, descending=True).tolist()
    target = [order[0][0], order[1][1], order[2][6]]  # expected; second; the least probable
    values = []
    for t in range(3):
        row = exchanged(teacher[t].tolist(), [target[t]])
        p, q = softmax(row), softmax(student[t].tolist())
        values.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    whole = ((values[0] + values[1]) / 2 + values[2]) / 2
    assert float(SwappedTokenDistillation()(answers(student, teacher, target, 7))) == pytest.approx(whole, rel=1e-5)
    kept = float(SwappedTokenDistillation()(answers(student.detach(), teacher, target, 3)))
    assert 0 < kept <= whole + 1e-6, "with fewer tokens kept it is a lower bound"
    same = torch.stack([torch.tensor(exchanged(row.tolist(), [t])) for row, t in zip(teacher, target, strict=True)])
    assert float(SwappedTokenDistillation()(answers(same, teacher, target, 3))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("labels", [[0, 1, 0, -1, 0], [-1] * 5])
def test_supervised_contrast_equals_the_plain_loop(labels: list[int]) -> None:
    """Without any label, captions are the classes."""
    captions = [0, 1, 1, 2, 3]
    made = replace(batch(captions), label=torch.tensor(labels))
    term = SupervisedContrast(temperature=0.5)
    named = any(label >= 0 for label in labels)
    term.begin([], ["car", "tree"] if named else [])
    classes = labels if named else captions
    image, values = dots(made.image, made.image, 2.0), []
    for i, own in enumerate(classes):
        mates = [j for j in range(5) if j != i and classes[j] == own >= 0]
        total = sum(math.exp(image[i][j]) for j in range(5) if j != i)
        if mates:
            values.append(-sum(image[i][j] - math.log(total) for j in mates) / len(mates))
    assert values
    assert float(term(made)) == pytest.approx(sum(values) / len(values), rel=1e-5)


def test_without_two_of_a_class_supervised_contrast_is_a_step_like_others() -> None:
    made = batch([0, 1, 2])
    term = SupervisedContrast()
    term.begin([], [])
    value = term(made)
    value.backward()
    assert float(value) == 0 and made.image.grad is not None
