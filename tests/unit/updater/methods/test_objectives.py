"""The shipped objectives against plain sums over floats, and the teacher that each row is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import ConfigError
from ratchet_methods.objectives.self_distillation import SelfDistillation
from serving.engines.clip_base import ClipBase
from serving.engines.vlm.vlm_base import VlmBase
from tests.support.tiny import tiny_adapter
from tests.support.tiny_vlm import tiny_vlm_adapter
from tests.unit.updater.builders import answers, batch, clip_learner_of, learner_of, question_pools, total
from tests.unit.updater.plain_rows import columns, contrast, dots, kl, softmax
from updater.adapters import read_delta
from updater.methods import objectives
from updater.methods.batches import OwnAnswers, divergence, summarise
from updater.methods.objectives import AnswerLikelihood, Contrastive, FeatureDistillation, TokenDistillation
from updater.recipes import Family, Part, Term
from updater.step.learner import AnyLearner

LENGTHS = [2, 1, 4]
NEW, REFERENCE, REPLAY = 0, [12, 13, 14, 15], [20, 21, 22, 23]
"""Rows of pools with 12 new, 8 reference and 8 replayed examples."""
PARTS: list[Part] = ["replay", "reference", "replay", "reference"]


@pytest.mark.parametrize("captions", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 0], [0, 0, 0]])
def test_contrast_equals_the_plain_sum(captions: list[int]) -> None:
    made = batch(captions)
    scores = dots(made.image, made.text, made.scale)
    both = contrast(scores, captions, captions) + contrast(columns(scores), captions, captions)
    assert float(Contrastive()(made)) == pytest.approx(both / 2, rel=1e-5)


def test_distillation_equals_the_plain_sum_in_both_towers() -> None:
    made, old = batch([0, 1, 2, 3]), batch([0, 1, 2, 3]).teachers["base"]
    image, text = (
        float((new - was).square().sum()) / 4 for new, was in ((made.image, old.image), (made.text, old.text))
    )
    assert float(FeatureDistillation()(made)) == pytest.approx((image + text) / 2, rel=1e-5)
    assert float(FeatureDistillation(image=0, text=3)(made)) == pytest.approx(1.5 * text, rel=1e-5)


def test_terms_add_up_by_weight_and_see_only_their_parts() -> None:
    made = batch([0, 1, 2, 3, 4], ["new", "reference", "replay", "reference", "new"])
    terms = [
        Term(name="contrastive", weight=2.0, over=("new", "reference", "replay")),
        Term(name="feature_distillation", weight=3.0, over=("reference", "replay")),
    ]
    loss, alone = total(terms, made)
    held = FeatureDistillation()(made.select([1, 2, 3]))
    assert float(loss) == pytest.approx(2 * float(Contrastive()(made)) + 3 * float(held), rel=1e-5)
    assert set(alone) == {"contrastive", "feature_distillation"}
    assert set(total(terms, batch([0, 1]))[1]) == {"contrastive"}, "a term without rows counts nothing"


def row_means(values: list[float], lengths: list[int]) -> float:
    means, start = [], 0
    for length in lengths:
        means.append(sum(values[start : start + length]) / length)
        start += length
    return sum(means) / len(means)


def plain_kl(teacher: list[float], student: list[float], k: int) -> float:
    """Over the teacher's k most probable tokens, and over all others as one outcome."""
    p, q = softmax(teacher), softmax(student)
    order = sorted(range(len(p)), key=lambda token: -p[token])
    pairs = [(p[token], q[token]) for token in order[:k]]
    if k < len(p):
        pairs.append((sum(p[token] for token in order[k:]), sum(q[token] for token in order[k:])))
    return sum(a * math.log(a / b) for a, b in pairs)


def test_likelihood_equals_the_plain_sum_and_long_answers_count_as_much_as_short_ones() -> None:
    made, _ = answers(LENGTHS)
    each = [-math.log(softmax(row)[int(token)]) for row, token in zip(made.logits.tolist(), made.target, strict=True)]
    assert float(AnswerLikelihood()(made)) == pytest.approx(row_means(each, LENGTHS), rel=1e-5)


@pytest.mark.parametrize("k", [1, 3, 6, 7, 50])
def test_distillation_equals_the_plain_sum_over_kept_tokens_and_the_rest_a_lower_bound_of_the_whole(k: int) -> None:
    made, teacher = answers(LENGTHS, k=k)
    rows = list(zip(teacher.tolist(), made.logits.tolist(), strict=True))
    each = [plain_kl(a, b, k) for a, b in rows]
    assert float(TokenDistillation()(made)) == pytest.approx(row_means(each, LENGTHS), rel=1e-4)
    found = divergence(summarise(teacher, k), made.logits).tolist()
    assert all(0 <= some <= kl(a, b) + 1e-6 for some, (a, b) in zip(found, rows, strict=True))


def test_terms_of_a_vlm_see_only_the_rows_of_their_parts() -> None:
    made, teacher = answers(LENGTHS, parts=["new", "reference", "replay"])
    terms = [
        Term(name="answer_likelihood", weight=2.0, over=("new",)),
        Term(name="token_distillation", weight=3.0, over=("reference", "replay")),
    ]
    loss, _ = total(terms, made, "vlm")
    new = -made.logits.log_softmax(1)[torch.arange(2), made.target[:2]].mean()
    held = divergence(summarise(teacher, 7), made.logits)
    assert float(loss) == pytest.approx(2 * float(new) + 3 * float(held[2] + held[3:].mean()) / 2, rel=1e-5)
    loss.backward()
    assert made.logits.grad is not None
    assert bool((made.logits.grad.abs().sum(dim=1) > 0).all())


@pytest.mark.parametrize(
    ("family", "term", "message"),
    [
        ("clip", Term(name="answer_likelihood"), "no objective 'answer_likelihood' for a CLIP"),
        ("vlm", Term(name="contrastive"), "no objective 'contrastive' for a VLM"),
        ("vlm", Term(name="token_distillation", options={"teacher": "nobody"}), "teacher is 'nobody'"),
    ],
)
def test_an_objective_of_another_family_or_teacher_is_refused(family: Family, term: Term, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        objectives.build([term], family)


def test_self_distillation_is_the_divergence_of_the_student_from_the_teacher_at_its_own_answers() -> None:
    """From the student's side (Shenfeld et al. 2026): sum over tokens of p log(p / q), p the student's."""
    made, _ = answers([1, 1, 1])
    logits, teacher = (torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    own = replace(made, own=OwnAnswers(logits, teacher, row=torch.tensor([0, 0, 0, 2, 2])))
    each = [kl(one, other) for one, other in zip(logits.tolist(), teacher.tolist(), strict=True)]
    assert float(SelfDistillation()(own.select([0, 2]))) == pytest.approx(row_means(each, [3, 2]), rel=1e-5)
    assert float(SelfDistillation()(own.select([2]))) == pytest.approx(row_means(each[3:], [2]), rel=1e-5)
    assert float(SelfDistillation()(made)) == 0.0, "no row was asked"


@pytest.fixture(params=["clip", "vlm"])
def learner(request: pytest.FixtureRequest, base: ClipBase, vlm: VlmBase, tmp_path: Path) -> Callable[..., AnyLearner]:
    """Makes a learner of a family's default recipe, with an incumbent if requested."""

    def made(start: bool = True) -> AnyLearner:
        if request.param == "clip":
            tiny_adapter(base, tmp_path / "adapter", seed=1)
            return clip_learner_of(base, start=read_delta(tmp_path / "adapter", base) if start else None)
        tiny_vlm_adapter(vlm, tmp_path / "adapter", seed=1)
        return learner_of(vlm, question_pools(12, 8, 8), read_delta(tmp_path / "adapter", vlm) if start else None)

    return made


def distillation(learner: AnyLearner, rows: list[int]) -> float:
    values = objectives.values(learner.objectives, learner.batch(rows))
    (value,) = (float(value) for term, value in values if term.name.endswith("_distillation"))
    return value


def test_an_update_begins_where_replayed_rows_want_to_stay(learner: Callable[..., AnyLearner]) -> None:
    """A teacher is asked only about the pools that are compared with it; the first update has the base as both."""
    made, first = learner(), learner(start=False)
    at_start = [distillation(first, REPLAY), distillation(first, REFERENCE), distillation(made, REPLAY)]
    assert at_start == pytest.approx([0, 0, 0], abs=1e-6)
    assert distillation(made, REFERENCE) > 1e-3
    both = distillation(made, REFERENCE + REPLAY)
    assert both == pytest.approx(distillation(made, REFERENCE) / 2, rel=1e-3)
    rows = [NEW, *REFERENCE, *REPLAY]
    made.ready(rows)
    kept = [{word for name in made.shards.names(row) for word in name.split(".")} for row in rows]
    assert [words & {"base", "incumbent"} for words in kept] == [set(), *[{"base"}] * 4, *[{"incumbent"}] * 4]
    costs = made.row_gflops(rows)
    assert costs["new"] < min(costs["reference"], costs["replay"])
    with torch.no_grad():
        for parameter in made.parameters.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert distillation(made, REPLAY) > 1e-4


def test_a_row_that_is_compared_with_no_teacher_cannot_be_taken_for_one_that_is(base: ClipBase) -> None:
    teachers = clip_learner_of(base).batch([NEW, *REFERENCE, *REPLAY]).teachers
    for name, rows in (("base", range(1, 5)), ("incumbent", range(5, 9))):
        known = [place for place in range(9) if not teachers[name].image[place].isnan().any()]
        assert known == list(rows)


def test_rows_are_compared_with_their_own_teacher() -> None:
    other = summarise(torch.randn(8, 7, generator=torch.Generator().manual_seed(4)), 7)
    said, _ = answers([2, 1, 3, 2], parts=PARTS)
    kinds: list[tuple[Any, Any]] = [
        (FeatureDistillation, batch([0, 1, 2, 3], PARTS)),
        (TokenDistillation, replace(said, teachers={**said.teachers, "incumbent": other})),
    ]
    for kind, made in kinds:
        halves = [kind(teacher=name)(made.select(rows)) for rows, name in (([0, 2], "incumbent"), ([1, 3], "base"))]
        found = kind(replay="incumbent")(made)
        torch.testing.assert_close(found, torch.stack(halves).mean())
        assert not torch.allclose(found, kind()(made))
