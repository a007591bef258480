"""Each term against a slow, plain reference written with loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.unit.updater.builders import batch, total
from updater.methods.objectives import Contrastive, FeatureDistillation
from updater.recipes import Part, Term


def _plain_contrast(image: list[list[float]], text: list[list[float]], caption: list[int], scale: float) -> float:
    """Both directions, row by row: minus the mean log probability of each row's positives."""
    n = len(caption)
    total = 0.0
    for one, other in ((image, text), (text, image)):
        for i in range(n):
            scores = [scale * sum(a * b for a, b in zip(one[i], other[j], strict=True)) for j in range(n)]
            norm = math.log(sum(math.exp(score) for score in scores))
            positives = [j for j in range(n) if caption[j] == caption[i]]
            total -= sum(scores[j] - norm for j in positives) / len(positives) / n
    return total / 2


@pytest.mark.parametrize("captions", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 0], [0, 0, 0]])
def test_contrast_equals_the_plain_sum(captions: list[int]) -> None:
    made = batch(captions)
    expected = _plain_contrast(made.image.tolist(), made.text.tolist(), captions, made.scale)
    assert float(Contrastive()(made)) == pytest.approx(expected, rel=1e-5)


def test_pictures_of_one_caption_do_not_push_it_away() -> None:
    """Two rows alike in both towers are at the minimum: no gradient, where one-hot targets would have one."""
    made = batch([0, 0])
    same = torch.ones(2, 6) / math.sqrt(6)
    image = same.clone().requires_grad_()
    alike = replace(made, image=image, text=same)
    Contrastive()(alike).backward()
    assert image.grad is not None
    assert float(image.grad.abs().max()) < 1e-6


def test_distillation_equals_the_plain_sum_in_both_towers() -> None:
    made = batch([0, 1, 2, 3])

    def squared(new: list[list[float]], old: list[list[float]]) -> float:
        return sum((a - b) ** 2 for x, y in zip(new, old, strict=True) for a, b in zip(x, y, strict=True)) / len(new)

    image = squared(made.image.tolist(), made.teachers["base"].image.tolist())
    text = squared(made.text.tolist(), made.teachers["base"].text.tolist())
    assert float(FeatureDistillation()(made)) == pytest.approx((image + text) / 2, rel=1e-5)
    assert float(FeatureDistillation(image=0, text=3)(made)) == pytest.approx(1.5 * text, rel=1e-5)
    FeatureDistillation()(made).backward()
    assert all(side.grad is not None and float(side.grad.abs().sum()) > 0 for side in (made.image, made.text))


def test_terms_add_up_by_weight_and_see_only_their_parts() -> None:
    parts: list[Part] = ["new", "reference", "replay", "reference", "new"]
    made = batch([0, 1, 2, 3, 4], parts)
    terms = [
        Term(name="contrastive", weight=2.0, over=("new", "reference", "replay")),
        Term(name="feature_distillation", weight=3.0, over=("reference", "replay")),
    ]
    loss, alone = total(terms, made)
    held = FeatureDistillation()(made.select([1, 2, 3]))
    assert float(loss) == pytest.approx(2 * float(Contrastive()(made)) + 3 * float(held), rel=1e-5)
    assert set(alone) == {"contrastive", "feature_distillation"}


def test_a_term_without_rows_counts_nothing() -> None:
    made = batch([0, 1], ["new", "new"])
    terms = [Term(name="feature_distillation", over=("replay",)), Term(name="contrastive")]
    loss, alone = total(terms, made)
    assert set(alone) == {"contrastive"}
    assert float(loss) == pytest.approx(float(Contrastive()(made)))
