"""Objectives of 2025 and 2026, each against a plain sum over floats, and their intended effects."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from core.errors import ConfigError
from ratchet_methods.objectives.agreement import AgreementContrast
from ratchet_methods.objectives.hybrid_distillation import HybridDistillation
from ratchet_methods.objectives.knowledge_consolidation import KnowledgeConsolidation
from ratchet_methods.objectives.neighbour_alignment import NeighbourAlignment
from tests.unit.updater.builders import batch
from tests.unit.updater.plain_rows import Rows, columns, dots, softmax
from updater.methods import objectives
from updater.methods.batches import Features, TeacherFeatures
from updater.methods.objectives import Contrastive
from updater.recipes import Part, Term


def mixed_cross_entropy(old: Rows, new: Rows, captions: list[int], own: float) -> float:
    values = []
    for i, (x, y) in enumerate(zip(old, new, strict=True)):
        same = captions.count(captions[i])
        target = [own * (c == captions[i]) / same + (1 - own) * p for c, p in zip(captions, softmax(x), strict=True)]
        values.append(-sum(t * math.log(q) for t, q in zip(target, softmax(y), strict=True)))
    return sum(values) / len(values)


@pytest.mark.parametrize("captions", [[0, 1, 2, 3], [0, 1, 0]])
def test_hybrid_distillation_equals_the_plain_sum(captions: list[int]) -> None:
    made = batch(captions)
    teacher = made.teachers["base"]
    old, new = dots(teacher.image, teacher.text, made.scale / 2), dots(made.image, made.text, made.scale / 2)
    image = mixed_cross_entropy(old, new, captions, 0.3)
    text = mixed_cross_entropy(columns(old), columns(new), captions, 0.3)
    found = HybridDistillation(own=0.3, temperature=2.0)(made)
    assert found.item() == pytest.approx(4 * (image + text) / 2, rel=1e-5)
    found.backward()
    assert made.image.grad is not None and bool(made.image.grad.isfinite().all())


def test_with_the_own_caption_alone_hybrid_distillation_is_the_contrast() -> None:
    made = batch([0, 1, 0, 2])
    torch.testing.assert_close(HybridDistillation(own=1.0)(made), Contrastive()(made))


def still(made: Features) -> Features:
    """The batch of a student that has not moved from the incumbent and the base."""
    same = TeacherFeatures(made.image.detach(), made.text.detach())
    return replace(made, teachers=dict.fromkeys(("base", "incumbent"), same))


def turned(made: Features, angle: float = 0.9) -> Features:
    """All features of a batch after the same rotation, which keeps every neighbour."""
    turn = torch.eye(made.image.shape[1])
    turn[0, 0] = turn[1, 1] = math.cos(angle)
    turn[0, 1], turn[1, 0] = -math.sin(angle), math.sin(angle)
    image, text = ((each.detach() @ turn).requires_grad_() for each in (made.image, made.text))
    return replace(made, image=image, text=text)


def test_neighbour_alignment_equals_the_plain_loop() -> None:
    made = batch(list(range(6)))
    found = NeighbourAlignment(neighbours=2, sharpness=5.0, proxies=False)(made).item()
    total = 0.0
    for new, old in ((made.image, made.teachers["base"].image), (made.text, made.teachers["base"].text)):
        rows = []
        similar, scores = dots(old, old), dots(new, new)
        for i in range(6):
            others = sorted((similar[i][j] for j in range(6) if j != i), reverse=True)
            border = (others[1] + others[2]) / 2
            near = [j for j in range(6) if j != i and similar[i][j] > border]
            far = [j for j in range(6) if j != i and similar[i][j] <= border]
            pull = sum(math.log1p(math.exp(-5 * (scores[i][j] - border))) for j in near) / len(near)
            push = sum(math.log1p(math.exp(5 * (scores[i][j] - border))) for j in far) / len(far)
            rows.append(pull + push)
        total += sum(rows) / 6 / 2
    assert found == pytest.approx(total, rel=1e-5)


def test_neighbour_alignment_lets_the_space_turn_as_a_whole() -> None:
    made = still(batch(list(range(8)), dim=4))
    term = NeighbourAlignment(neighbours=3)
    torch.testing.assert_close(term(turned(made)), term(made), rtol=1e-4, atol=1e-5)
    torch.manual_seed(9)
    broken = F.normalize(torch.randn_like(made.image), dim=1).requires_grad_()
    assert term(replace(made, image=broken)) > term(made) + 0.1
    assert NeighbourAlignment()(made.select([0, 1])).item() == 0


def test_consolidation_begins_as_a_contrast_with_the_old_features_and_its_projection_follows_a_turn() -> None:
    made = still(batch(list(range(8)), dim=4))
    term: Any = KnowledgeConsolidation(rate=0.05)
    own = F.cross_entropy(made.scale * made.image @ made.image.T, torch.arange(8))
    text = F.cross_entropy(made.scale * made.text @ made.text.T, torch.arange(8))
    torch.testing.assert_close(term(made), (own + text) / 2)
    moved = turned(made)
    before = term(moved).item()
    for _ in range(60):
        term.stepped(moved)
    assert term(moved).item() < before - 0.1
    again: Any = KnowledgeConsolidation()
    again.load_state({name: value.clone() for name, value in term.state().items()})
    torch.testing.assert_close(again(moved), term(moved))


def _plain_agreement(made: Features, doubtful: float, domains: list[int]) -> float:
    """Row by row, in plain numbers; captions differ."""
    size = len(domains)
    rows = [row for row, part in enumerate(made.part) if part == "new"]
    believed: dict[str, list[list[list[float]]]] = {}
    for name in ("base", "incumbent"):
        teacher = made.teachers[name]
        scores = dots(teacher.image, teacher.text)
        believed[name] = [
            [softmax([made.scale * scores[i][j] for j in rows]) for i in rows],
            [softmax([made.scale * scores[j][i] for j in rows]) for i in rows],
        ]
    likely = {
        name: [(math.log(both[0][n][n]) + math.log(both[1][n][n])) / 2 for n in range(len(rows))]
        for name, both in believed.items()
    }
    better = [max(believed, key=lambda name, n=n: likely[name][n]) for n in range(len(rows))]
    most = [likely[name][n] for n, name in enumerate(better)]
    total = 0.0
    new = dots(made.image, made.text)
    for direction in range(2):
        for i in range(size):
            logits = [made.scale * (new[i][j] if direction == 0 else new[j][i]) for j in range(size)]
            target = [float(i == j) for j in range(size)]
            if i in rows:
                n = rows.index(i)
                group = [m for m in range(len(rows)) if domains[rows[m]] == domains[i]]
                rank = sum(most[m] < most[n] for m in group) + sum(most[m] == most[n] for m in group) / 2
                trust = min(1.0, rank / len(group) / doubtful)
                soft = dict(zip(rows, believed[better[n]][direction][n], strict=True))
                target = [trust * t + (1 - trust) * soft.get(j, 0.0) for j, t in enumerate(target)]
            total -= sum(t * math.log(p) for t, p in zip(target, softmax(logits), strict=True)) / size / 2
    return total


def test_contrast_by_agreement_equals_the_plain_loop() -> None:
    parts: list[Part] = ["new", "reference", "new", "new", "replay", "new", "new"]
    domains = [0, 1, 0, 0, 2, 3, 3]
    made = replace(batch(list(range(7)), parts), domain=torch.tensor(domains))
    hidden = torch.tensor([part != "new" for part in parts])[:, None]
    blank = {  # as the learner gives rows that this term does not compare
        name: TeacherFeatures(*(torch.where(hidden, torch.nan, side) for side in (each.image, each.text)))
        for name, each in made.teachers.items()
    }
    found = AgreementContrast(doubtful=0.6)(replace(made, teachers=blank))
    assert found.item() == pytest.approx(_plain_agreement(made, 0.6, domains), rel=1e-5)
    found.backward()
    assert made.image.grad is not None and torch.isfinite(made.image.grad).all()


def test_a_swapped_caption_teaches_less_than_one_that_the_model_agrees_with() -> None:
    """A student that matches pictures and captions as its teachers do."""
    right = still(batch(list(range(8)), dim=16, seed=3))
    places = [1, 0, *range(2, 8)]
    known = {n: TeacherFeatures(t.image, t.image[places]) for n, t in right.teachers.items()}
    student = known["base"]
    wrong = replace(right, image=student.image.clone(), text=student.text.clone(), teachers=known)
    assert AgreementContrast(doubtful=0.5)(wrong) < Contrastive()(wrong)
    only_old = replace(wrong, part=("reference",) * 8)
    torch.testing.assert_close(AgreementContrast()(only_old), Contrastive()(only_old))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("agreement_contrast", {"doubtful": 0.0}, "above 0"),
        ("hybrid_distillation", {"own": 1.5}, "between 0 and 1"),
        ("hybrid_distillation", {"temperature": 0}, "above 0"),
        ("neighbour_alignment", {"neighbours": 0}, "above 0"),
        ("neighbour_alignment", {"teacher": "momentum"}, "not one of"),
        ("knowledge_consolidation", {"rate": -1.0}, "above 0"),
    ],
)
def test_an_option_without_a_meaning_is_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        objectives.build([Term(name=name, options=options)], "clip")
