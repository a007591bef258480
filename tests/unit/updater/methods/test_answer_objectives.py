"""The terms of a VLM's loss against slow, plain references written with loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from core.errors import ConfigError
from ratchet_methods.objectives.self_distillation import SelfDistillation
from tests.unit.updater.builders import answers, total
from updater.methods import objectives
from updater.methods.batches import OwnAnswers, divergence, summarise
from updater.methods.objectives import AnswerLikelihood, TokenDistillation
from updater.recipes import Part, Term

LENGTHS = [2, 1, 4]


def _probabilities(logits: list[float]) -> list[float]:
    whole = sum(math.exp(value) for value in logits)
    return [math.exp(value) / whole for value in logits]


def _row_means(values: list[float], lengths: list[int]) -> float:
    means, start = [], 0
    for length in lengths:
        means.append(sum(values[start : start + length]) / length)
        start += length
    return sum(means) / len(means)


def _plain_kl(teacher: list[float], student: list[float], k: int) -> float:
    """Over the teacher's k most probable tokens, and over all others as one outcome."""
    p, q = _probabilities(teacher), _probabilities(student)
    order = sorted(range(len(p)), key=lambda token: -p[token])
    pairs = [(p[token], q[token]) for token in order[:k]]
    if k < len(p):
        pairs.append((sum(p[token] for token in order[k:]), sum(q[token] for token in order[k:])))
    return sum(a * math.log(a / b) for a, b in pairs)


def test_likelihood_equals_the_plain_sum_and_long_answers_count_as_much_as_short_ones() -> None:
    made, _ = answers(LENGTHS)
    each = [
        -math.log(_probabilities(row)[int(token)]) for row, token in zip(made.logits.tolist(), made.target, strict=True)
    ]
    assert float(AnswerLikelihood()(made)) == pytest.approx(_row_means(each, LENGTHS), rel=1e-5)


@pytest.mark.parametrize("k", [1, 3, 6, 7, 50])
def test_distillation_equals_the_plain_sum_over_kept_tokens_and_the_rest(k: int) -> None:
    made, teacher = answers(LENGTHS, k=k)
    each = [_plain_kl(a, b, k) for a, b in zip(teacher.tolist(), made.logits.tolist(), strict=True)]
    assert float(TokenDistillation()(made)) == pytest.approx(_row_means(each, LENGTHS), rel=1e-4)


def test_with_every_token_kept_it_is_the_whole_divergence_and_with_fewer_a_lower_bound() -> None:
    made, teacher = answers(LENGTHS)
    whole = (teacher.softmax(1) * (teacher.log_softmax(1) - made.logits.log_softmax(1))).sum(1)
    assert torch.allclose(divergence(summarise(teacher, 7), made.logits), whole, atol=1e-5)
    for k in (1, 3, 6):
        some = divergence(summarise(teacher, k), made.logits)
        assert bool((some <= whole + 1e-6).all()) and bool((some >= 0).all())


def test_terms_see_only_the_rows_of_their_parts() -> None:
    parts: list[Part] = ["new", "reference", "replay"]
    made, teacher = answers(LENGTHS, parts=parts)
    terms = [
        Term(name="answer_likelihood", weight=2.0, over=("new",)),
        Term(name="token_distillation", weight=3.0, over=("reference", "replay")),
    ]
    loss, alone = total(terms, made, "vlm")
    new = -made.logits.log_softmax(1)[torch.arange(2), made.target[:2]].mean()
    kl = divergence(summarise(teacher, 7), made.logits)
    held = (kl[2] + kl[3:].mean()) / 2
    assert float(alone["answer_likelihood"]) == pytest.approx(float(new), rel=1e-5)
    assert float(loss) == pytest.approx(2 * float(new) + 3 * float(held), rel=1e-5)
    loss.backward()
    assert made.logits.grad is not None
    assert bool((made.logits.grad.abs().sum(dim=1) > 0).all())


def test_an_objective_of_the_other_family_or_an_unknown_teacher_is_refused() -> None:
    for family, name in (("clip", "answer_likelihood"), ("vlm", "contrastive")):
        with pytest.raises(ConfigError, match=f"no objective '{name}' for a {family.upper()}"):
            objectives.build([Term(name=name)], family)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="teacher is 'nobody'"):
        objectives.build([Term(name="token_distillation", options={"teacher": "nobody"})], "vlm")


def test_self_distillation_is_the_divergence_of_the_student_from_the_teacher_at_its_own_answers() -> None:
    """From the student's side (Shenfeld et al. 2026): sum over tokens of p log(p / q), p the student's."""
    made, _ = answers([1, 1, 1])
    logits, teacher = (torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    own = OwnAnswers(logits, teacher, row=torch.tensor([0, 0, 0, 2, 2]))
    each = [
        sum(p * math.log(p / q) for p, q in zip(_probabilities(one), _probabilities(other), strict=True))
        for one, other in zip(logits.tolist(), teacher.tolist(), strict=True)
    ]
    of_both = replace(made, own=own).select([0, 2])
    assert float(SelfDistillation()(of_both)) == pytest.approx(_row_means(each, [3, 2]), rel=1e-5)
    last = replace(made, own=own).select([2])
    assert float(SelfDistillation()(last)) == pytest.approx(_row_means(each[3:], [2]), rel=1e-5)
    assert float(SelfDistillation()(made)) == 0.0, "no row was asked"
