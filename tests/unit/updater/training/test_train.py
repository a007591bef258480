"""One update on tiny bases of both families: what it writes, what it refuses, and that it gives the same again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from core.errors import BudgetError, DiskFull, TrainingError
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from serving.engines.lora import effective_weights
from serving.engines.vlm.vlm_base import VlmBase
from tests.unit.updater.builders import (
    LIMITS,
    assert_served_as_trained,
    pairs,
    pools,
    question_pools,
    recipe,
    resumed,
    run,
)
from updater.adapters import read_delta
from updater.adapters.weight_deltas import kept_share
from updater.data.pools import Pair, Pools
from updater.families.clip_learner import ClipLearner
from updater.recipes import Recipe
from updater.step.learner import AnyLearner, Learner
from updater.training import checkpoint
from updater.training.checkpoint import load_checkpoint
from updater.training.result import TrainResult


class Kind(NamedTuple):
    """A family: what is trained by which recipe on what."""

    base: ClipBase | VlmBase
    name: str
    pools: Callable[..., Pools]

    def train(self, folder: Path, **options: Any) -> TrainResult:
        return run(self.base, folder, **{"recipe": self.recipe(), "pools": self.pools(), **options})

    def recipe(self, **changes: Any) -> Recipe:
        return recipe(self.name, **changes)


@pytest.fixture(params=["clip", "vlm"])
def kind(request: pytest.FixtureRequest, base: ClipBase, vlm: VlmBase) -> Kind:
    return Kind(vlm, "vlm-default", question_pools) if request.param == "vlm" else Kind(base, "default", pools)


def test_the_same_inputs_give_the_same_adapter_and_others_another(kind: Kind, tmp_path: Path) -> None:
    one = kind.train(tmp_path / "one").adapter
    assert kind.train(tmp_path / "two").adapter == one
    assert kind.train(tmp_path / "seed", seed=4).adapter != one
    assert kind.train(tmp_path / "data", pools=kind.pools(new=14)).adapter != one


@pytest.mark.parametrize("image", [{"blocks": 1}, {"locked": False}])
def test_a_stopped_update_goes_on_and_ends_in_the_same_adapter(
    kind: Kind, tmp_path: Path, image: dict[str, Any]
) -> None:
    """Stopped after each single step in turn, with an incumbent that teaches: attention weights must not drift."""
    first = kind.train(tmp_path / "first").directory
    again = {"recipe": kind.recipe(image=image), "incumbent": first, "pools": kind.pools(replay=12)}
    whole = kind.train(tmp_path / "whole", **again)
    parts = resumed(partial(kind.train, tmp_path / "parts", **again), 4, least=2)  # after three shards
    assert parts.adapter == whole.adapter
    assert parts.losses == whole.losses


def test_an_update_goes_on_from_the_incumbent(kind: Kind, tmp_path: Path) -> None:
    """With almost no learning the candidate is the incumbent again."""
    first = kind.train(tmp_path / "first")
    still = {"peak": 1e-9, "constant": 1e-9, "final": 1e-9}
    second = kind.train(tmp_path / "second", incumbent=first.directory, recipe=kind.recipe(schedule=still))
    model = kind.base.build_model()
    before, after = (effective_weights(r.directory, model) for r in (first, second))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.allclose(after[name], weight, atol=1e-6)


def test_the_budget_decides_the_number_of_steps(kind: Kind, tmp_path: Path) -> None:
    """Two steps and the rows that they visit; no other is prepared."""
    one, two, free = (kind.train(tmp_path / f"{n}", recipe=kind.recipe(max_steps=n)) for n in (1, 2, 5))
    assert one.maf < two.maf < free.maf
    per_step = free.cost["maf_per_step"]
    enough_for_two = two.maf + 0.1 * per_step
    bound = kind.train(tmp_path / "bound", limits=replace(LIMITS, gflops=enough_for_two))
    assert (bound.steps, bound.planned_steps) == (2, 2)
    assert bound.maf <= enough_for_two
    assert bound.samples == {"new": 6, "reference": 12, "replay": 0}
    with pytest.raises(BudgetError, match="does not pay for one step with its own rows"):
        kind.train(tmp_path / "poor", limits=replace(LIMITS, gflops=one.maf - 0.5 * per_step))


def test_training_lowers_the_loss_and_writes_what_the_engine_serves(base: ClipBase, tmp_path: Path) -> None:
    fast = {"kind": "infinite", "peak": 0.01, "constant": 0.01, "final": 0.01, "warmup_steps": 1, "cooldown_steps": 1}
    result = run(base, tmp_path, recipe=recipe(max_steps=12, batch_size=18, schedule=fast))
    losses = result.losses["contrastive"]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.05
    assert result.directory.name == result.adapter
    engine = ClipEngine(base)
    spaces = engine.load(result.adapter, result.directory)
    assert spaces.image != base.spaces.image and spaces.text != base.spaces.text
    assert_served_as_trained(base, result)


def test_a_damaged_checkpoint_starts_the_update_again(base: ClipBase, tmp_path: Path) -> None:
    whole = run(base, tmp_path)
    file = tmp_path / "work" / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    assert run(base, tmp_path).adapter == whole.adapter


def test_a_disk_that_is_full_at_a_checkpoint_is_no_fault_of_the_update(
    base: ClipBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(base, tmp_path / "whole")
    with monkeypatch.context() as small:

        def full(*_: object, **__: object) -> None:
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        small.setattr(checkpoint, "save_file", full)
        with pytest.raises(DiskFull, match="No space left"):
            run(base, tmp_path / "full")
    assert run(base, tmp_path / "full").adapter == whole.adapter


def test_a_checkpoint_of_another_run_is_not_taken(base: ClipBase, tmp_path: Path) -> None:
    run(base, tmp_path, seed=3)
    fresh = run(base, tmp_path / "fresh", seed=4)
    assert run(base, tmp_path, seed=4).adapter == fresh.adapter
    assert load_checkpoint(tmp_path / "work", "another run") is None


def test_an_incumbent_of_a_higher_rank_is_cut_to_the_recipes_and_what_is_kept_is_said(
    base: ClipBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = run(base, tmp_path / "first", recipe=recipe(rank=8, max_steps=2))
    same = run(base, tmp_path / "same", incumbent=first.directory, recipe=recipe(rank=8, max_steps=1))
    assert same.cost["incumbent_kept"] == 1
    assert "the incumbent's rank" not in caplog.text
    lower = run(base, tmp_path / "lower", incumbent=first.directory, recipe=recipe(rank=2, max_steps=1))
    kept = kept_share(read_delta(first.directory, base), 2)
    assert lower.cost["incumbent_kept"] == kept < 1
    assert f"holds {100 * kept:.1f}% of what it learned" in caplog.text


def test_a_locked_tower_keeps_its_embedding_space_also_over_an_incumbent(base: ClipBase, tmp_path: Path) -> None:
    first = run(base, tmp_path / "first")
    engine = ClipEngine(base)
    before = engine.load(first.adapter, first.directory)
    for name, which in (("locked-image", "image"), ("locked-text", "text")):
        alone = run(base, tmp_path / name, recipe=recipe(name))
        spaces = engine.load(alone.adapter, alone.directory)
        assert getattr(spaces, which) == getattr(base.spaces, which)
        assert spaces != base.spaces
        onward = run(base, tmp_path / f"{name}-on", recipe=recipe(name), incumbent=first.directory)
        spaces = engine.load(onward.adapter, onward.directory)
        assert getattr(spaces, which) == getattr(before, which)
        assert spaces != before


def test_the_wall_clock_bound_is_recorded(base: ClipBase, tmp_path: Path) -> None:
    result = run(base, tmp_path, limits=replace(LIMITS, seconds=1e-6))
    assert result.truncated
    assert (result.steps, result.planned_steps) == (1, 5)


def test_a_loss_that_is_not_finite_stops_the_update_and_writes_nothing(
    base: ClipBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Learner.forward_backward

    def broken(self: AnyLearner, rows: list[int]) -> tuple[float, dict[str, float]]:
        return float("nan"), real(self, rows)[1]

    monkeypatch.setattr(Learner, "forward_backward", broken)
    with pytest.raises(TrainingError, match="step 0 is nan"):
        run(base, tmp_path)
    assert not list(tmp_path.glob("adapters/clip-*"))


def test_parameters_that_are_not_finite_are_never_written(
    base: ClipBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(self: AnyLearner, rate: float, step: int, steps: int) -> None:
        with torch.no_grad():
            next(iter(self.parameters.values())).fill_(float("inf"))

    monkeypatch.setattr(Learner, "optimizer_step", poison)
    with pytest.raises(TrainingError):
        run(base, tmp_path, recipe=recipe(max_steps=1))
    assert not list(tmp_path.glob("adapters/clip-*"))


def test_the_incumbent_teaches_from_the_boundary_on_what_it_says_of_the_whole_input(
    base: ClipBase, tmp_path: Path
) -> None:
    last = {"image": {"blocks": 1}, "text": {"blocks": 1}}
    first = run(base, tmp_path, recipe=recipe("naive", **last))
    learner = ClipLearner(base, recipe("lwf", **last), read_delta(first.directory, base), seed=0)
    assert all(tower.cut > 0 for tower in learner.towers.values())
    taught = pairs("car", 12)
    learner.prepare(taught, ["new"] * 12)
    pixels = np.stack([base.preprocess.pixels(pair.read()) for pair in taught])
    inputs = {
        "image": base.preprocess.normalise(pixels),
        "text": base.tokenizer()([pair.text for pair in taught]),
    }
    learner.ready(range(12))
    for which in ("image", "text"):
        with torch.no_grad():
            whole = learner.towers[which].whole(inputs[which])
            with learner.model.base():
                plain = learner.towers[which].whole(inputs[which])
        told = torch.stack(learner.shards.get(f"{which}.incumbent", range(12)))
        assert torch.allclose(told, whole, atol=1e-5)
        assert not torch.allclose(whole, plain, atol=1e-3)


def test_each_image_is_read_once(base: ClipBase, tmp_path: Path) -> None:
    """Teacher features and boundaries are kept per sample; later steps read nothing.

    Six are measured as full fine-tuning, and the rows of one step were read in advance when the first was measured.
    """
    reads: dict[str, int] = {}

    def counted(pair: Pair) -> Pair:
        def read() -> bytes:
            reads[pair.id] = reads.get(pair.id, 0) + 1
            return pair.read()

        return Pair(pair.id, pair.text, read)

    counting = Pools(tuple(map(counted, pairs("car", 20))), tuple(map(counted, pairs("house", 20))))
    run(base, tmp_path, recipe=recipe(max_steps=10), pools=counting)
    assert len(reads) == 40
    assert sum(reads.values()) <= 40 + 6 + 9
