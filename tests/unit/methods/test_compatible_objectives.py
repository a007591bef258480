"""Terms that keep new vectors useful beside old ones, against plain sums, and what they do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from ratchet_methods.objectives.backward_compatible import BackwardCompatible
from ratchet_methods.objectives.compatible_momentum_contrast import CompatibleMomentumContrast
from serving.engines.clip_base import ClipBase
from tests.unit.updater.builders import batch, pools, recipe
from tests.unit.updater.plain_rows import Rows, columns, dots
from updater.families.clip_learner import ClipLearner
from updater.methods.batches import Features, TeacherFeatures
from updater.recipes import Part


def _taught(captions: list[int], seed: int = 0) -> Features:
    """A batch with an incumbent and a momentum model."""
    made, other = batch(captions, seed=seed), batch(captions, seed=seed + 100)
    first, second = made.teachers["base"], other.teachers["base"]
    return replace(made, teachers={"incumbent": first, "momentum": second})


def _plain_contrast(scores: Rows, own: Sequence[int], keys: Sequence[int], extra: Rows | None = None) -> float:
    """Mean over rows of minus the mean log probability of the keys of its caption; ``extra`` are more negatives."""
    values = []
    for i, row in enumerate(scores):
        norm = sum(math.exp(score) for score in (*row, *(extra[i] if extra else ())))
        positives = [score for score, caption in zip(row, keys, strict=True) if caption == own[i]]
        values.append(-sum(score - math.log(norm) for score in positives) / len(positives))
    return sum(values) / len(values)


def _others(scores: Rows, captions: Sequence[int]) -> Rows:
    return [[score for j, score in enumerate(row) if captions[j] != captions[i]] for i, row in enumerate(scores)]


@pytest.mark.parametrize("captions", [[0, 1, 2, 3], [0, 1, 0], [0, 0]])
def test_backward_compatibility_equals_the_plain_sum(captions: list[int]) -> None:
    made = _taught(captions)
    old, new = made.teachers["incumbent"], dots(made.image, made.text, made.scale)
    image = _plain_contrast(dots(made.image, old.text, made.scale), captions, captions, _others(new, captions))
    text = _plain_contrast(dots(made.text, old.image, made.scale), captions, captions, _others(columns(new), captions))
    found = BackwardCompatible()(made)
    assert found.item() == pytest.approx((image + text) / 2, rel=1e-5)
    found.backward()
    assert all(side.grad is not None and bool(side.grad.isfinite().all()) for side in (made.image, made.text))


@pytest.mark.parametrize("captions", [[0, 1, 2], [0, 1, 1]])
def test_momentum_contrast_equals_the_plain_sum_over_batch_and_queue(captions: list[int]) -> None:
    term = CompatibleMomentumContrast(temperature=0.5, queue=4)
    earlier, made = _taught([2, 7, 0], seed=5), _taught(captions)
    keys, numbers = made.teachers["momentum"], list(captions)
    for queued in (False, True):
        if queued:
            term.stepped(earlier)
            old = earlier.teachers["momentum"]
            keys = TeacherFeatures(torch.cat([keys.image, old.image]), torch.cat([keys.text, old.text]))
            numbers += [2, 7, 0]
        image = _plain_contrast(dots(made.image, keys.text, 2), captions, numbers)
        text = _plain_contrast(dots(made.text, keys.image, 2), captions, numbers)
        assert term(made).item() == pytest.approx((image + text) / 2, rel=1e-5)


def test_the_queue_forgets_the_oldest_and_is_remembered_whole() -> None:
    term = CompatibleMomentumContrast(queue=5)
    assert term.state() == {}
    steps = [_taught([3 * n, 3 * n + 1, 3 * n + 2], seed=n) for n in range(3)]
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
    made = pools(new=6, reference=0)
    parts: list[Part] = ["new"] * 6
    learner.prepare(made.new, parts)  # type: ignore[arg-type]
    start = {name: value.detach().clone() for name, value in learner.parameters.items()}
    rows = list(range(6))
    learner.forward_backward(rows)
    learner.optimizer_step(0.1)
    for name, value in learner.parameters.items():
        expected = 0.75 * start[name] + 0.25 * value.detach()
        assert learner.momentum is not None and torch.allclose(learner.momentum.values[name], expected, atol=1e-6)
    learner.forward_backward(rows)
    features = learner._last
    assert isinstance(features, Features)
    first = learner.objectives[0][1].state()
    assert not torch.allclose(features.teachers["momentum"].image, features.image, atol=1e-4), "it lags"
    assert not torch.allclose(features.teachers["momentum"].image, first["image"], atol=1e-4), "and moves"
    assert not features.teachers["momentum"].image.requires_grad
