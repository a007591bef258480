from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from core.errors import TrainingError
from serving.engines.backends import Processor
from serving.engines.clip_base import ClipBase
from serving.engines.engine_choice import SMALL_BYTES
from serving.engines.vlm.vlm_base import VlmBase
from tests.unit.updater.builders import clip_learner_of, learner_of, question_pools, recipe, run
from updater.step import passes
from updater.step.learner import Learner
from updater.step.passes import training_precision
from updater.training.workers import Stopped

ROWS = [0, 13, 2, 25, 14, 5, 27, 16, 8, 21, 1]
TOLERANCE = 0.02
"""Of losses, relative: bfloat16 has eight bits of mantissa, an error of 0.004 in each product."""
FAST = Processor("Xeon", amx=True, avx512_bf16=True)


def steps(made: Learner[Any], count: int) -> list[float]:
    losses = []
    for step in range(count):
        losses.append(made.forward_backward(ROWS)[0])
        made.optimizer_step(0.01, step, count)
    return losses


def gradient(made: Learner[Any]) -> torch.Tensor:
    made.forward_backward(ROWS)
    return torch.cat([p.grad.flatten() for p in made.parameters.values() if p.grad is not None])


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
    assert torch.cosine_similarity(gradient(whole), gradient(half), dim=0) > 0.95
    expected, found = steps(whole, 4), steps(half, 4)
    assert found == pytest.approx(expected, rel=TOLERANCE)
    assert found != expected
    assert abs(expected[-1] - expected[0]) > 1e-3, "the steps did something"


def test_what_learns_and_what_is_compared_is_float32(base: ClipBase) -> None:
    half = clip_learner_of(base, precision="bfloat16")
    batch = half.batch(ROWS)
    assert batch.image.dtype == batch.text.dtype == batch.teachers["base"].image.dtype == torch.float32
    steps(half, 1)
    state = half.state()
    assert {value.dtype for name, value in state.items() if name.startswith(("parameter", "optimizer"))} == {
        torch.float32
    }


@pytest.mark.parametrize("changes", [{}, {"image": {"locked": False}}])
def test_a_vlm_agrees_too(vlm: VlmBase, changes: dict[str, Any]) -> None:
    pool = question_pools(new=12, reference=8, replay=8)
    whole, half = (learner_of(vlm, pool, precision=each, **changes) for each in ("float32", "bfloat16"))
    expected, found = steps(whole, 2), steps(half, 2)
    assert found == pytest.approx(expected, rel=TOLERANCE) and found != expected
    assert half.batch(ROWS).logits.dtype == torch.float32


def test_auto_is_bfloat16_where_the_processor_multiplies_it_fast_and_the_base_is_large(
    base: ClipBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = replace(base, weights_bytes=SMALL_BYTES)
    cpu = torch.device("cpu")
    for processor, expected in (
        (Processor("EPYC"), "float32"),
        (Processor("EPYC", avx512_bf16=True), "float32"),
        (FAST, "bfloat16"),
        (Processor("T4", cuda=(7, 5)), "float32"),
        (Processor("H100", cuda=(9, 0)), "bfloat16"),
    ):
        monkeypatch.setattr(passes, "processor", lambda device, found=processor: found)
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
    assert resumed.cost["precision"] == "bfloat16"
    assert resumed.losses == whole.losses
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
