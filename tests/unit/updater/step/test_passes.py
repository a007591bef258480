"""Conflicting gradients, micro-batches and precision: what a step computes in several passes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from core.errors import TrainingError
from serving.engines.clip_base import ClipBase
from serving.engines.precision import SMALL_BYTES
from serving.engines.processor import Processor
from serving.engines.vlm.vlm_base import VlmBase
from tests.unit.updater.builders import batch, clip_learner_of, learner_of, png, pools, question_pools, recipe, run
from updater.data.pools import Pair
from updater.families.clip_learner import ClipLearner
from updater.methods.objectives import Contrastive
from updater.step import passes
from updater.step.learner import Learner
from updater.step.passes import agreement, harmonized_backward, training_precision, without_conflicts
from updater.training.measure import measure
from updater.training.workers import Stopped

ROWS = [0, 13, 2, 25, 14, 5, 27, 16, 8, 21, 1]
"""Of pools with 12 new, 8 reference and 8 replayed examples; 11 rows do not divide into micro-batches of 4."""


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


def test_surgery_equals_the_plain_projections_and_terms_that_agree_are_added() -> None:
    made = torch.Generator().manual_seed(0)
    first, second = (nn.Parameter(torch.randn(2, 2, generator=made)) for _ in range(2))
    directions = [torch.randn(8, generator=made) for _ in range(4)]
    flat = torch.cat([first.flatten(), second.flatten()])
    harmonized_backward([flat @ direction for direction in directions], [first, second])
    assert first.grad is not None and second.grad is not None
    expected = plain_surgery([direction.tolist() for direction in directions])
    assert torch.cat([first.grad.flatten(), second.grad.flatten()]).tolist() == pytest.approx(expected, rel=1e-5)

    at, other = nn.Parameter(torch.tensor([1.0, 0.5])), nn.Parameter(torch.tensor([2.0]))
    harmonized_backward([at.sum(), (at * torch.tensor([1.0, 2.0])).sum(), 0 * at.sum()], [at, other])
    assert at.grad is not None and other.grad is not None
    assert (at.grad.tolist(), other.grad.tolist()) == ([2.0, 3.0], [0.0])


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
    locked = replace(made, image=made.image.detach())  # a locked tower has no part in it
    found = agreement(Contrastive()(locked), locked)
    assert bool(torch.isfinite(found).all()) and found.tolist() != pytest.approx(expected, abs=1e-5)


def test_no_row_is_left_out_where_none_conflicts() -> None:
    """Rows come in equal pairs and have the same gradient."""
    image, text = (torch.eye(4)[rows].requires_grad_() for rows in ([0, 0, 1, 1], [2, 2, 3, 3]))
    made = replace(batch([0, 0, 1, 1]), image=image, text=text)
    assert float(agreement(Contrastive()(made), made).min()) > 0
    assert without_conflicts(Contrastive()(made), made, 0.5) == [0, 1, 2, 3]


def test_a_learner_leaves_wrong_captions_out_of_its_steps(base: ClipBase) -> None:
    """6 of 24 new pairs carry the caption of another colour; a step leaves out at most 6, by chance 1.5 wrong ones."""
    names, colours = ["red", "green", "blue", "white"], [(200, 40, 40), (40, 200, 40), (40, 40, 200), (220, 220, 220)]
    examples = []
    for row in range(48):
        said = (row % 4 + 1 + row % 3) % 4 if row < 6 else row % 4
        noise = np.random.default_rng(row).integers(-40, 40, (24, 24, 3))
        picture = png(np.clip(np.array(colours[row % 4]) + noise, 0, 255).astype(np.uint8))
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


# Micro-batches


def learner(base: ClipBase, name: str, **changes: Any) -> ClipLearner:
    """Away from the start, where LoRA's A has no gradient."""
    made, generator = clip_learner_of(base, name, **changes), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return made


def gradients(made: Learner[Any]) -> dict[str, Tensor]:
    made.forward_backward(ROWS)
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
    expected = gradients(whole)
    assert same(expected, gradients(cached))
    cached.batch(ROWS)
    assert same(expected, gradients(cached)), "passes without a backward pass are forgotten"


def test_rows_that_conflict_are_left_out_of_it_too(base: ClipBase) -> None:
    changes = {"gradients": {"drop": 0.5}}
    whole, cached = learner(base, "default", **changes), learner(base, "default", micro_batch=4, **changes)
    assert same(gradients(whole), gradients(cached))
    assert whole.left_out and whole.left_out == cached.left_out


SDFT = [{"name": "self_distillation", "over": ["new"], "options": {"keep": 0.5}}]


@pytest.mark.parametrize("changes", [{}, {"image": {"locked": False}}, {"objectives": SDFT}])
def test_the_gradient_of_a_vlm_is_that_of_the_whole_batch(vlm: VlmBase, changes: dict[str, Any]) -> None:
    pool = question_pools(new=12, reference=8, replay=8)
    whole, cached = (learner_of(vlm, pool, micro_batch=size, **changes) for size in (0, 4))
    assert same(gradients(whole), gradients(cached))


def test_it_takes_less_memory_and_one_forward_pass_more(base: ClipBase) -> None:
    rows = [*pools(new=12, reference=8, replay=8).new]
    costs = [measure(learner(base, "default", micro_batch=size), rows, [list(range(24))]) for size in (0, 12, 4)]
    whole, half, sixth = (cost.peak_bytes for cost in costs)
    # Of the whole batch both towers are kept, of a micro-batch one at a time: at least 1/2 against 1/2 - 1/6 is saved.
    assert whole - half > 1.4 * (half - sixth) > 0
    assert half - sixth > 0.1 * (whole - sixth)
    assert 1.2 < costs[1].step_gflops / costs[0].step_gflops < 1.6
    # Beside its rows each pass runs one picture through the stem.
    assert costs[1].step_gflops < costs[2].step_gflops < 1.05 * costs[1].step_gflops


# Precision

TOLERANCE = 0.02
"""Of losses, relative: bfloat16 has eight bits of mantissa, an error of 0.004 in each product."""
FAST = Processor("Xeon", amx=True, avx512_bf16=True)


def steps(made: Learner[Any], count: int) -> list[float]:
    losses = []
    for step in range(count):
        losses.append(made.forward_backward(ROWS)[0])
        made.optimizer_step(0.01, step, count)
    return losses


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("default", {}),
        ("default", {"micro_batch": 4}),
        ("default", {"image": {}, "text": {}}),
        ("ctp", {}),
        ("dora", {}),
    ],
)
def test_a_few_steps_agree_in_both_precisions(base: ClipBase, name: str, changes: dict[str, Any]) -> None:
    whole, half = (clip_learner_of(base, name, precision=each, **changes) for each in ("float32", "bfloat16"))
    one, other = (torch.cat([value.flatten() for value in gradients(each).values()]) for each in (whole, half))
    assert torch.cosine_similarity(one, other, dim=0) > 0.95
    expected, found = steps(whole, 4), steps(half, 4)
    assert found == pytest.approx(expected, rel=TOLERANCE) and found != expected
    assert abs(expected[-1] - expected[0]) > 1e-3, "the steps did something"
    made, state = half.batch(ROWS), half.state()
    learned = {value.dtype for key, value in state.items() if key.startswith(("parameter", "optimizer"))}
    compared = {made.image.dtype, made.text.dtype, *(teacher.image.dtype for teacher in made.teachers.values())}
    assert learned == compared == {torch.float32}


@pytest.mark.parametrize("changes", [{}, {"image": {"locked": False}}])
def test_steps_of_a_vlm_agree_in_both_precisions(vlm: VlmBase, changes: dict[str, Any]) -> None:
    pool = question_pools(new=12, reference=8, replay=8)
    whole, half = (learner_of(vlm, pool, precision=each, **changes) for each in ("float32", "bfloat16"))
    expected, found = steps(whole, 2), steps(half, 2)
    assert found == pytest.approx(expected, rel=TOLERANCE) and found != expected
    assert half.batch(ROWS).logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (Processor("EPYC"), "float32"),
        (Processor("EPYC", avx512_bf16=True), "float32"),
        (FAST, "bfloat16"),
        (Processor("T4", cuda=(7, 5)), "float32"),
        (Processor("H100", cuda=(9, 0)), "bfloat16"),
    ],
)
def test_auto_is_bfloat16_where_the_processor_multiplies_it_fast_and_the_base_is_large(
    base: ClipBase, monkeypatch: pytest.MonkeyPatch, processor: Processor, expected: str
) -> None:
    monkeypatch.setattr(passes, "processor", lambda device: processor)
    large, cpu = replace(base, weights_bytes=SMALL_BYTES), torch.device("cpu")
    assert training_precision(recipe(), large, cpu) == expected
    assert training_precision(recipe(), base, cpu) == "float32"
    assert training_precision(recipe(precision="bfloat16"), base, cpu) == "bfloat16"
    assert training_precision(recipe(precision="float32"), large, cpu) == "float32"


def test_a_resumed_update_keeps_its_precision(base: ClipBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(base, tmp_path / "whole", recipe=recipe(precision="bfloat16"))
    monkeypatch.setattr(passes, "SMALL_BYTES", 0)
    monkeypatch.setattr(passes, "processor", lambda device: FAST)
    asked = iter(range(100))
    with pytest.raises(Stopped):
        run(base, tmp_path / "parts", stop=lambda: next(asked) == 4)
    monkeypatch.setattr(passes, "processor", lambda device: Processor("EPYC"))
    resumed = run(base, tmp_path / "parts")
    assert (resumed.cost["precision"], resumed.losses) == ("bfloat16", whole.losses)
    tensors = load_file(resumed.directory / "adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float32}, "the candidate is not"
    assert run(base, tmp_path / "elsewhere").cost["precision"] == "float32"


def test_a_gradient_that_is_not_finite_ends_the_update(base: ClipBase) -> None:
    made = clip_learner_of(base)
    made.forward_backward(ROWS)
    before = {name: p.detach().clone() for name, p in made.parameters.items()}
    first = next(iter(made.parameters.values()))
    first.grad = torch.full_like(first, torch.inf)
    with pytest.raises(TrainingError, match="gradient of step 3 is not finite"):
        made.optimizer_step(0.01, step=3, steps=5)
    assert all(torch.equal(before[name], p) for name, p in made.parameters.items())
