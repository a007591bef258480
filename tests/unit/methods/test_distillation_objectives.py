"""Terms that keep who is near to whom: each against a plain sum, and what it does to features that learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor
from torch.nn import functional as F

from ratchet_methods.objectives.divergence import row_divergence
from ratchet_methods.objectives.off_diagonal_distillation import OffDiagonalDistillation
from ratchet_methods.objectives.random_text_distillation import NAME, RandomTextDistillation, random_texts
from ratchet_methods.objectives.topology_preservation import TopologyPreservation
from tests.unit.updater.builders import batch
from tests.unit.updater.plain_rows import columns, cross_entropy, dots, kl, mean_kl, without_diagonal
from updater.methods.batches import AuxiliaryTexts, Features, TeacherFeatures
from updater.methods.objectives import ContrastiveDistillation
from updater.recipes import Part, load_recipe

Term = Callable[[Features], Tensor]


def _taught(captions: list[int], seed: int = 0) -> Features:
    """A batch with an incumbent besides the base, and six further texts."""
    made, other = batch(captions, seed=seed), batch(list(range(6)), seed=seed + 50)
    incumbent = batch(captions, seed=seed + 100)
    sides = TeacherFeatures(incumbent.image.detach(), incumbent.text.detach())
    texts = AuxiliaryTexts(other.image, {"incumbent": other.text.detach()}, torch.full((6,), -1), torch.arange(6))
    return replace(made, teachers={**made.teachers, "incumbent": sides}, texts={NAME: texts})


def _unmoved(captions: list[int]) -> Features:
    """The student is what the incumbent is."""
    made = _taught(captions)
    old, texts = made.teachers["incumbent"], made.texts[NAME]
    same = replace(texts, text=texts.teachers["incumbent"].clone().requires_grad_())
    return replace(
        made, image=old.image.clone().requires_grad_(), text=old.text.clone().requires_grad_(), texts={NAME: same}
    )


def test_a_masked_divergence_is_that_of_what_is_left() -> None:
    made = torch.Generator().manual_seed(0)
    old, new = torch.randn(3, 4, generator=made), torch.randn(3, 4, generator=made).requires_grad_()
    masked = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    found = row_divergence(old, new, masked)
    kept = [[0, 2, 3], [0, 1, 2, 3], []]
    expected = [kl([old[i, j].item() for j in js], [new[i, j].item() for j in js]) for i, js in enumerate(kept)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    found.sum().backward()
    assert new.grad is not None and not bool(new.grad[masked].any())
    assert bool(new.grad[:2][~masked[:2]].all()), "and all the others count"


@pytest.mark.parametrize("teacher", ["base", "incumbent"])
def test_contrastive_distillation_equals_the_plain_sum(teacher: str) -> None:
    made = _taught([0, 1, 2, 3, 3])
    old = dots(made.teachers[teacher].image, made.teachers[teacher].text, made.scale / 3)
    new = dots(made.image, made.text, made.scale / 3)
    expected = 9 * (cross_entropy(old, new) + cross_entropy(columns(old), columns(new)))
    assert float(ContrastiveDistillation(3.0, teacher)(made)) == pytest.approx(expected, rel=1e-5)


def test_images_are_compared_with_frozen_captions_of_the_whole_reference_as_well() -> None:
    made, objective = _taught([0, 1, 2, 2]), ContrastiveDistillation(temperature=3.0, captions=2)
    parts: list[Part] = ["new", "reference", "reference", "reference", "reference"]
    wanted = objective.further_texts(["a new one", "A car", "a tree", "a car ", "a house"], [], parts)
    assert wanted == [(-1, "a car"), (-1, "a tree")] and objective.frozen_texts
    with_texts = replace(made, texts={"contrastive_distillation": replace(made.texts[NAME], teachers=_bases(made))})
    old, new = made.teachers["base"], made
    sharpness = made.scale / 3.0
    frozen = with_texts.texts["contrastive_distillation"].teachers["base"]
    before = dots(old.image, torch.cat([old.text, frozen]), sharpness)
    after = dots(new.image, torch.cat([new.text, frozen]), sharpness)
    texts = cross_entropy(*(columns(dots(side.image, side.text, sharpness)) for side in (old, new)))
    assert float(objective(with_texts)) == pytest.approx(9 * (cross_entropy(before, after) + texts), rel=1e-5)


def _bases(made: Features) -> dict[str, Tensor]:
    return {"base": made.texts[NAME].teachers["incumbent"]}


def test_random_text_distillation_equals_the_plain_sum() -> None:
    made = _taught([0, 1, 2])
    old = dots(made.teachers["incumbent"].image, made.texts[NAME].teachers["incumbent"], made.scale / 2)
    new = dots(made.image, made.texts[NAME].text, made.scale / 2)
    assert float(RandomTextDistillation()(made)) == pytest.approx(4 * cross_entropy(old, new), rel=1e-5)


@pytest.mark.parametrize(
    "term",
    [
        ContrastiveDistillation(teacher="incumbent"),
        RandomTextDistillation(),
        OffDiagonalDistillation(),
        TopologyPreservation(),
    ],
)
def test_where_nothing_moved_nothing_pulls(term: Term) -> None:
    made = _unmoved([0, 1, 2, 2])
    term(made).backward()
    sides = [side.grad for side in (made.image, made.text, made.texts[NAME].text) if side.grad is not None]
    assert len(sides) == 2
    assert all(float(gradient.abs().max()) < 1e-6 for gradient in sides)


def test_random_texts_follow_the_seed_and_have_as_many_tokens_as_asked() -> None:
    texts = random_texts(20, 7, seed=1)
    assert texts == random_texts(20, 7, seed=1)
    assert texts != random_texts(20, 7, seed=2)
    assert len(set(texts)) == 20
    assert {len(SimpleTokenizer().encode(text)) for text in texts} == {7}
    assert RandomTextDistillation(20, 7, 1).further_texts(["a car"], [], ["new"]) == [(-1, text) for text in texts]


def _plain_off_diagonal(old: list[list[float]], new: list[list[float]]) -> float:
    rows = zip(old, new, without_diagonal(old), without_diagonal(new), strict=True)
    kept = [kl(x, y) for i, (row, _, x, y) in enumerate(rows) if max(row) == row[i]]
    return sum(kept) / len(old)


def test_off_diagonal_distillation_equals_the_plain_sum_without_rows_that_were_wrong() -> None:
    made = _taught([0, 1, 2, 3, 4, 5], seed=3)
    teacher = made.teachers["incumbent"]
    teacher.text[1:4] = F.normalize(teacher.image[1:4] + 0.3 * teacher.text[1:4], dim=1)
    old, new = dots(teacher.image, teacher.text), dots(made.image, made.text)
    wrong = sum(max(row) != row[i] for rows in (old, columns(old)) for i, row in enumerate(rows))
    assert 0 < wrong < 12, "some rows of either kind"
    expected = (_plain_off_diagonal(old, new) + _plain_off_diagonal(columns(old), columns(new))) / 2
    assert float(OffDiagonalDistillation()(made)) == pytest.approx(expected, rel=1e-5)


def test_the_shipped_strength_of_mod_x_is_that_of_the_published_code() -> None:
    """Alpha 20, cosines, and the sum over the 64 rows of a batch; it was some 16 times as strong."""
    made = _taught(list(range(64)), seed=3)
    teacher = made.teachers["incumbent"]
    teacher.text[:] = F.normalize(teacher.image + 0.01 * teacher.text, dim=1)
    old, new = dots(teacher.image, teacher.text), dots(made.image, made.text)
    both = _plain_off_diagonal(old, new) + _plain_off_diagonal(columns(old), columns(new))
    term = next(t for t in load_recipe("mod-x").objectives if t.name == "off_diagonal_distillation")
    assert term.weight * float(OffDiagonalDistillation()(made)) == pytest.approx(20 * 64 * both / 2, rel=1e-4)


def test_off_diagonal_distillation_leaves_what_belongs_together_to_the_contrast() -> None:
    """Two captions alike: all four of their pairs are positives, and a batch of one caption has nothing to keep."""
    made = _taught([0, 0, 1])
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
    assert float(OffDiagonalDistillation()(_taught([0, 0, 0]))) == 0


def test_topology_preservation_equals_the_plain_sum() -> None:
    made = _taught([0, 1, 2, 2])
    old = made.teachers["incumbent"]
    across = dots(old.image, old.text, 4), dots(made.image, made.text, 4)
    image = dots(old.image, old.image, 4), dots(made.image, made.image, 4)
    text = dots(old.text, old.text, 4), dots(made.text, made.text, 4)
    between = mean_kl(*across) + mean_kl(columns(across[0]), columns(across[1]))
    within = sum(mean_kl(without_diagonal(before), without_diagonal(after)) for before, after in (image, text))
    assert float(TopologyPreservation(temperature=0.25)(made)) == pytest.approx((between + within) / 2, rel=1e-5)


def test_topology_is_kept_when_all_is_turned_alike_and_one_row_has_none() -> None:
    made = _taught([0, 1, 2, 3])
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    old = made.teachers["incumbent"]
    turned = replace(made, image=old.image @ turn, text=old.text @ turn)
    assert float(TopologyPreservation()(turned)) == pytest.approx(0, abs=1e-5)
    assert float(TopologyPreservation()(made)) > 0.1
    assert float(TopologyPreservation()(made.select([2]))) == 0
