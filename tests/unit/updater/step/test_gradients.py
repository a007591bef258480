"""Gradient harmonization: projections against plain loops, and which rows are left out as noise."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from serving.engines.clip_base import ClipBase
from tests.unit.updater.builders import batch, recipe
from updater.data.pools import Pair
from updater.families.clip_learner import ClipLearner
from updater.methods.objectives import Contrastive
from updater.step.passes import agreement, harmonized_backward, without_conflicts

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200), "white": (220, 220, 220)}


def plain_surgery(gradients: list[list[float]]) -> list[float]:
    """Each gradient off those that it conflicts with, in order, and their sum."""
    whole = [0.0] * len(gradients[0])
    for i, gradient in enumerate(gradients):
        own = list(gradient)
        for j, other in enumerate(gradients):
            product = sum(a * b for a, b in zip(own, other, strict=True))
            if i != j and product < 0:
                size = sum(b * b for b in other)
                own = [a - product / size * b for a, b in zip(own, other, strict=True)]
        whole = [a + b for a, b in zip(whole, own, strict=True)]
    return whole


def test_surgery_equals_the_plain_projections() -> None:
    made = torch.Generator().manual_seed(0)
    first, second = (nn.Parameter(torch.randn(2, 2, generator=made)) for _ in range(2))
    directions = [torch.randn(8, generator=made) for _ in range(4)]
    flat = torch.cat([first.flatten(), second.flatten()])
    harmonized_backward([flat @ direction for direction in directions], [first, second])
    assert first.grad is not None
    assert second.grad is not None
    expected = plain_surgery([direction.tolist() for direction in directions])
    assert torch.cat([first.grad.flatten(), second.grad.flatten()]).tolist() == pytest.approx(expected, rel=1e-5)


def test_a_harmonized_step_lowers_both_of_two_terms_that_conflict() -> None:
    """The sum of the gradients is along the larger one and raises the smaller term; the harmonized one does not."""
    at = nn.Parameter(torch.tensor([1.0, 0.5]))
    directions = torch.tensor([[10.0, 0.0], [-1.0, 1.0]])
    assert float(directions.sum(dim=0) @ directions[1]) < 0
    harmonized_backward([at @ direction for direction in directions], [at])
    assert at.grad is not None
    assert float(at.grad @ directions[0]) > 0
    assert float(at.grad @ directions[1]) > 0


def test_terms_that_agree_are_added_and_a_term_without_a_parameter_changes_nothing() -> None:
    at, other = nn.Parameter(torch.tensor([1.0, 0.5])), nn.Parameter(torch.tensor([2.0]))
    harmonized_backward([at.sum(), (at * torch.tensor([1.0, 2.0])).sum(), 0 * at.sum()], [at, other])
    assert at.grad is not None
    assert other.grad is not None
    assert at.grad.tolist() == [2.0, 3.0]
    assert other.grad.tolist() == [0.0]


def test_agreement_is_that_of_the_gradients_of_a_map_after_each_tower() -> None:
    """The reference gives every row a map of its own, and asks autograd."""
    made = batch([0, 1, 0, 2, 3])
    maps = [torch.zeros(5, 6, 6, requires_grad=True) for _ in range(2)]
    mapped = [
        F.normalize(side.detach() + torch.einsum("nij,nj->ni", m, side.detach() - side.detach().mean(dim=0)), dim=1)
        for m, side in zip(maps, (made.image, made.text), strict=True)
    ]
    own = torch.autograd.grad(Contrastive()(replace(made, image=mapped[0], text=mapped[1])), maps)
    rows = torch.cat([gradient.flatten(1) for gradient in own], dim=1)
    expected = [F.cosine_similarity(rows[i], rows.sum(dim=0) - rows[i], dim=0).item() for i in range(5)]
    assert agreement(Contrastive()(made), made).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_tower_that_is_locked_has_no_part_in_it() -> None:
    made = batch([0, 1, 2, 3])
    locked = replace(made, image=made.image.detach())
    assert bool(torch.isfinite(agreement(Contrastive()(locked), locked)).all())
    assert not torch.equal(agreement(Contrastive()(locked), locked), agreement(Contrastive()(made), made))


def test_no_row_is_left_out_where_none_conflicts() -> None:
    """Rows come in pairs that are alike, and ask for the same."""
    image, text = (torch.eye(4)[rows].requires_grad_() for rows in ([0, 0, 1, 1], [2, 2, 3, 3]))
    made = replace(batch([0, 0, 1, 1]), image=image, text=text)
    assert float(agreement(Contrastive()(made), made).min()) > 0
    assert without_conflicts(Contrastive()(made), made, 0.5) == [0, 1, 2, 3]


def coloured(colour: tuple[int, int, int], number: int) -> bytes:
    """A PNG of one colour, with some noise."""
    noise = np.random.default_rng(number).integers(-40, 40, (24, 24, 3))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_learner_leaves_wrong_captions_out_of_its_steps(base: ClipBase) -> None:
    """6 of 24 new pairs carry the caption of another colour; 6 are left out of a step at most, by chance 1.5 wrong."""
    names = list(COLOURS)
    examples = []
    for row in range(48):
        colour = row % 4
        said = (colour + 1 + row % 3) % 4 if row < 6 else colour
        picture = coloured(COLOURS[names[colour]], row)
        examples.append(Pair(str(row), f"a {names[said]} square", lambda picture=picture: picture))
    plan = recipe("harmonized", gradients={"harmonize": True, "drop": 0.25}, temperature=0.05)
    learner = ClipLearner(base, plan, {}, seed=0)
    learner.prepare(examples, ["new"] * 24 + ["reference"] * 24)
    found = Counter[bool]()
    for step in range(12):
        learner.forward_backward(range(48))
        learner.optimizer_step(3e-3, step, 12)
        assert len(learner.left_out) <= 6
        found.update(row < 6 for row in learner.left_out)
    assert found[True] > 1.5 * 0.25 * found.total() > 0
