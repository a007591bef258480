from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from serving.engines.clip_base import ClipBase
from serving.engines.vlm.vlm_base import VlmBase
from tests.unit.updater.builders import batch, clip_learner_of, learner_of, png, pools, question_pools, recipe, run
from updater.data.pools import Pair
from updater.families.clip_learner import ClipLearner
from updater.methods.objectives import Contrastive
from updater.step.learner import Learner
from updater.step.passes import CachedPasses, agreement, harmonized_backward, without_conflicts
from updater.training.measure import measure

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200), "white": (220, 220, 220)}


def plain_surgery(gradients: list[list[float]]) -> list[float]:
    """Project each gradient off those that it conflicts with, in order, and return their sum."""
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


def test_terms_that_agree_are_added_and_a_term_without_a_parameter_changes_nothing() -> None:
    at, other = nn.Parameter(torch.tensor([1.0, 0.5])), nn.Parameter(torch.tensor([2.0]))
    harmonized_backward([at.sum(), (at * torch.tensor([1.0, 2.0])).sum(), 0 * at.sum()], [at, other])
    assert at.grad is not None
    assert other.grad is not None
    assert at.grad.tolist() == [2.0, 3.0]
    assert other.grad.tolist() == [0.0]


def test_agreement_is_that_of_the_gradients_of_a_map_after_each_tower() -> None:
    """The reference gives every row its own map, and asks autograd."""
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
    """Rows come in equal pairs and have the same gradient."""
    image, text = (torch.eye(4)[rows].requires_grad_() for rows in ([0, 0, 1, 1], [2, 2, 3, 3]))
    made = replace(batch([0, 0, 1, 1]), image=image, text=text)
    assert float(agreement(Contrastive()(made), made).min()) > 0
    assert without_conflicts(Contrastive()(made), made, 0.5) == [0, 1, 2, 3]


def coloured(colour: tuple[int, int, int], number: int) -> bytes:
    noise = np.random.default_rng(number).integers(-40, 40, (24, 24, 3))
    return png(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


def test_a_learner_leaves_wrong_captions_out_of_its_steps(base: ClipBase) -> None:
    """6 of 24 new pairs carry the caption of another colour; a step leaves out at most 6, by chance 1.5 wrong ones."""
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


ROWS = [0, 13, 2, 25, 14, 5, 27, 16, 8, 21, 1]
"""Of pools with 12 new, 8 reference and 8 replayed examples; 11 rows do not divide into micro-batches of 4."""


def learner(base: ClipBase, name: str, **changes: Any) -> ClipLearner:
    """Away from the start, where LoRA's A has no gradient."""
    made, generator = clip_learner_of(base, name, **changes), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return made


def gradients(made: Learner[Any], rows: list[int]) -> dict[str, Tensor]:
    made.forward_backward(rows)
    return {name: p.grad.clone() for name, p in made.parameters.items() if p.grad is not None}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys() and any(bool(value.any()) for value in first.values())
    largest = max(float(value.abs().max()) for value in first.values())
    return all(torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-4 * largest) for name in first)


@pytest.mark.parametrize("name", ["default", "locked-image", "ctp", "dreamlip", "vr-lwf", "dora", "full"])
def test_the_gradient_is_that_of_the_whole_batch(base: ClipBase, name: str) -> None:
    whole, cached = learner(base, name), learner(base, name, micro_batch=4)
    losses = whole.forward_backward(ROWS), cached.forward_backward(ROWS)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-4)
    assert losses[0][1] == pytest.approx(losses[1][1], rel=1e-3, abs=1e-5)
    assert same(gradients(whole, ROWS), gradients(cached, ROWS))


def test_rows_that_conflict_are_left_out_of_it_too(base: ClipBase) -> None:
    changes = {"gradients": {"drop": 0.5}}
    whole, cached = learner(base, "default", **changes), learner(base, "default", micro_batch=4, **changes)
    assert same(gradients(whole, ROWS), gradients(cached, ROWS))
    assert whole.left_out and whole.left_out == cached.left_out


def test_passes_without_a_backward_pass_are_forgotten(base: ClipBase) -> None:
    made = learner(base, "default", micro_batch=4)
    expected = gradients(made, ROWS)
    made.batch(ROWS)
    assert same(expected, gradients(made, ROWS))


@pytest.mark.parametrize("changes", [{}, {"image": {"locked": False}}])
def test_a_vlm_too(vlm: VlmBase, changes: dict[str, Any]) -> None:
    pool = question_pools(new=12, reference=8, replay=8)
    whole, cached = (learner_of(vlm, pool, micro_batch=size, **changes) for size in (0, 4))
    assert same(gradients(whole, ROWS), gradients(cached, ROWS))


def test_it_takes_less_memory_and_one_forward_pass_more(base: ClipBase) -> None:
    pool = pools(new=12, reference=8, replay=8)
    costs = [
        measure(learner(base, "default", micro_batch=size), list(pool.new), [list(range(24))]) for size in (0, 12, 4)
    ]
    whole, half, sixth = (cost.peak_bytes for cost in costs)
    # Of the whole batch both towers are kept, of a micro-batch one at a time: at least 1/2 against 1/2 - 1/6 is saved.
    assert whole - half > 1.4 * (half - sixth) > 0
    assert half - sixth > 0.1 * (whole - sixth)
    assert 1.2 < costs[1].step_gflops / costs[0].step_gflops < 1.6
    # Beside its rows each pass runs one picture through the stem.
    assert costs[1].step_gflops < costs[2].step_gflops < 1.05 * costs[1].step_gflops


def test_an_update_ends_where_one_with_the_whole_batch_does(base: ClipBase, tmp_path: Path) -> None:
    whole, cached = (run(base, tmp_path / str(size), recipe=recipe(micro_batch=size, max_steps=2)) for size in (0, 4))
    for name, values in whole.losses.items():
        assert cached.losses[name] == pytest.approx(values, rel=1e-3, abs=1e-6)


def test_without_gradients_nothing_is_kept_for_a_backward_pass() -> None:
    passes = CachedPasses(2)
    weight = torch.ones(1, requires_grad=True)
    with torch.no_grad():
        assert passes(lambda rows: weight * torch.tensor(rows), [1, 2, 3]).tolist() == [1, 2, 3]
    passes.backward()
    assert weight.grad is None
