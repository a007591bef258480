from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from core.errors import BudgetError, ConfigError, DiskFull, TrainingError
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from serving.engines.lora import effective_weights
from serving.engines.vlm.vlm_base import VlmBase
from tests.unit.updater.builders import (
    LIMITS,
    assert_served_as_trained,
    pools,
    question_pools,
    recipe,
    resumed,
    run,
)
from updater.adapters import read_delta
from updater.adapters.weight_deltas import kept_share
from updater.data.pools import Pools, Question
from updater.recipes import Recipe
from updater.step.learner import AnyLearner, Learner
from updater.training import checkpoint
from updater.training.checkpoint import load_checkpoint
from updater.training.result import TrainResult


class Kind(NamedTuple):
    """A family: its recipe and data."""

    base: ClipBase | VlmBase
    name: str
    pools: Callable[..., Pools]

    def train(self, folder: Path, **options: Any) -> TrainResult:
        return run(self.base, folder, **{"recipe": self.recipe(), "pools": self.pools(), **options})

    def recipe(self, **changes: Any) -> Recipe:
        return recipe(self.name, **changes)


@pytest.fixture(scope="module", params=["clip", "vlm"])
def kind(request: pytest.FixtureRequest, base: ClipBase, vlm: VlmBase) -> Kind:
    return Kind(vlm, "vlm-default", question_pools) if request.param == "vlm" else Kind(base, "default", pools)


@pytest.fixture(scope="module")
def first(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return kind.train(tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def first_clip(base: ClipBase, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return run(base, tmp_path_factory.mktemp("first"))


def test_the_same_inputs_give_the_same_adapter_and_others_another(
    kind: Kind, first: TrainResult, tmp_path: Path
) -> None:
    assert kind.train(tmp_path / "two").adapter == first.adapter
    assert kind.train(tmp_path / "seed", seed=4).adapter != first.adapter
    assert kind.train(tmp_path / "data", pools=kind.pools(new=14)).adapter != first.adapter


@pytest.mark.parametrize("image", [{"blocks": 1}, {"locked": False}])
def test_a_stopped_update_goes_on_and_ends_in_the_same_adapter(
    kind: Kind, first: TrainResult, tmp_path: Path, image: dict[str, Any]
) -> None:
    """Stopped after each single step in turn, with an incumbent that teaches: attention weights must not drift."""
    plan = kind.recipe(image=image, max_steps=4)
    again = {"recipe": plan, "incumbent": first.directory, "pools": kind.pools(replay=12)}
    whole = kind.train(tmp_path / "whole", **again)
    parts = resumed(partial(kind.train, tmp_path / "parts", **again), 4, least=2)  # after three shards
    assert (parts.adapter, parts.losses) == (whole.adapter, whole.losses)


def test_an_update_goes_on_from_the_incumbent(kind: Kind, first: TrainResult, tmp_path: Path) -> None:
    """With almost no learning the candidate equals the incumbent."""
    still = {"peak": 1e-9, "constant": 1e-9, "final": 1e-9}
    second = kind.train(tmp_path / "second", incumbent=first.directory, recipe=kind.recipe(schedule=still))
    model = kind.base.build_model()
    before, after = (effective_weights(r.directory, model) for r in (first, second))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.allclose(after[name], weight, atol=1e-6)


def test_the_budget_decides_the_number_of_steps(kind: Kind, first: TrainResult, tmp_path: Path) -> None:
    """Two steps and the rows that they visit; no other is prepared."""
    one, two = (kind.train(tmp_path / f"{n}", recipe=kind.recipe(max_steps=n)) for n in (1, 2))
    assert one.maf < two.maf < first.maf
    per_step = first.cost["maf_per_step"]
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


def test_a_checkpoint_that_is_damaged_or_of_another_run_is_not_taken(
    base: ClipBase, first_clip: TrainResult, tmp_path: Path
) -> None:
    run(base, tmp_path, seed=4)
    assert load_checkpoint(tmp_path / "work", "another run") is None
    assert run(base, tmp_path).adapter == first_clip.adapter
    file = tmp_path / "work" / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    assert run(base, tmp_path).adapter == first_clip.adapter


def test_a_disk_that_is_full_at_a_checkpoint_is_no_fault_of_the_update(
    base: ClipBase, first_clip: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Mock(side_effect=SafetensorError("I/O error: No space left on device (os error 28)"))
    with monkeypatch.context() as small, pytest.raises(DiskFull, match="No space left"):
        small.setattr(checkpoint, "save_file", full)
        run(base, tmp_path)
    assert run(base, tmp_path).adapter == first_clip.adapter


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


@pytest.mark.parametrize("which", ["image", "text"])
def test_a_locked_tower_keeps_its_embedding_space_also_over_an_incumbent(
    base: ClipBase, first_clip: TrainResult, tmp_path: Path, which: str
) -> None:
    engine, plan = ClipEngine(base), recipe(f"locked-{which}", max_steps=2)
    before = engine.load(first_clip.adapter, first_clip.directory)
    for incumbent, spaces in ((None, base.spaces), (first_clip.directory, before)):
        made = run(base, tmp_path / str(incumbent is None), recipe=plan, incumbent=incumbent)
        now = engine.load(made.adapter, made.directory)
        assert getattr(now, which) == getattr(spaces, which) and now != spaces


def test_the_wall_clock_bound_is_recorded(base: ClipBase, tmp_path: Path) -> None:
    result = run(base, tmp_path, limits=replace(LIMITS, seconds=1e-6))
    assert result.truncated
    assert (result.steps, result.planned_steps) == (1, 5)


def nan_loss(
    learner: AnyLearner, rows: list[int], real: Callable[..., Any] = Learner.forward_backward
) -> tuple[float, dict[str, float]]:
    return float("nan"), real(learner, rows)[1]


def poison(learner: AnyLearner, rate: float, step: int, steps: int) -> None:
    with torch.no_grad():
        next(iter(learner.parameters.values())).fill_(float("inf"))


@pytest.mark.parametrize(
    ("method", "broken", "message"),
    [("forward_backward", nan_loss, "step 0 is nan"), ("optimizer_step", poison, "after step 1 .* not finite")],
)
def test_a_loss_or_a_parameter_that_is_not_finite_stops_the_update_and_writes_nothing(
    base: ClipBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, broken: Any, message: str
) -> None:
    monkeypatch.setattr(Learner, method, broken)
    with pytest.raises(TrainingError, match=message):
        run(base, tmp_path, recipe=recipe(max_steps=1))
    assert not list(tmp_path.glob("adapters/clip-*"))


FAST = {"kind": "infinite", "peak": 0.02, "constant": 0.02, "final": 0.02, "warmup_steps": 1, "cooldown_steps": 1}


def vlm_run(vlm: VlmBase, folder: Path, name: str = "vlm-default", **options: Any) -> TrainResult:
    given = {"pools": question_pools(), "recipe": recipe(name), **options}
    return run(vlm, folder, **given)


def test_training_lowers_the_loss_and_writes_an_adapter_of_the_language_model(vlm: VlmBase, tmp_path: Path) -> None:
    result = vlm_run(vlm, tmp_path, recipe=recipe("vlm-naive", max_steps=10, batch_size=12, schedule=FAST))
    losses = result.losses["answer_likelihood"]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 1
    assert result.adapter.startswith("vlm-") and result.directory.name == result.adapter
    changed = effective_weights(result.directory, vlm.build_model())
    assert changed and {vlm.part_of(name.removesuffix(".weight")) for name in changed} == {"text"}


def test_distillation_holds_the_reference_answers_where_they_were(vlm: VlmBase, tmp_path: Path) -> None:
    """With the teacher's weight, the divergence on reference questions ends far below that without."""
    drift = {}
    for weight in (1e-6, 20.0):
        terms = [
            {"name": "answer_likelihood", "over": ["new"]},
            {"name": "token_distillation", "weight": weight, "over": ["reference"]},
        ]
        result = vlm_run(
            vlm,
            tmp_path / str(weight),
            recipe=recipe("vlm-default", objectives=terms, max_steps=12, batch_size=12, schedule=FAST),
        )
        drift[weight] = float(np.mean(result.losses["token_distillation"][-3:]))
    assert drift[20.0] < 0.3 * drift[1e-6]


def test_what_cannot_be_asked_is_left_out_and_nothing_left_is_an_error(vlm: VlmBase, tmp_path: Path) -> None:
    good = question_pools(new=20)
    bad = Question("bad", "where is <image>?", "there", good.new[0].read)
    with_bad = vlm_run(vlm, tmp_path / "bad", pools=Pools((bad, *good.new), good.reference))
    assert (with_bad.samples["new"], with_bad.pending, with_bad.visited) == (15, 21, 15)
    assert with_bad.adapter == vlm_run(vlm, tmp_path / "good", pools=good).adapter
    with pytest.raises(TrainingError, match="no new sample"):
        vlm_run(vlm, tmp_path / "none", pools=Pools((bad,), good.reference))


def test_a_recipe_of_the_other_family_is_refused(base: ClipBase, vlm: VlmBase, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'default' trains a CLIP"):
        run(vlm, tmp_path, pools=pools())
    with pytest.raises(ConfigError, match="'vlm-default' trains a VLM"):
        run(base, tmp_path, recipe=recipe("vlm-default"), pools=question_pools())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vlm-logit-swap", "text"),
        ("vlm-orthogonal", "text"),
        pytest.param("vlm-sdft", "text", marks=pytest.mark.long),
        ("vlm-connector", "connector"),
    ],
)
def test_each_other_recipe_trains_two_updates_of_its_part(vlm: VlmBase, tmp_path: Path, name: str, part: str) -> None:
    first = vlm_run(vlm, tmp_path / "first", name, recipe=recipe(name, max_steps=2))
    changed = effective_weights(first.directory, vlm.build_model())
    assert changed and {vlm.part_of(each.removesuffix(".weight")) for each in changed} == {part}
    again = {"incumbent": first.directory, "carry_over": first.carry_over, "seed": 5}
    second = vlm_run(vlm, tmp_path / "second", name, recipe=recipe(name, max_steps=2), **again)
    assert second.adapter != first.adapter
    assert second.adapter == vlm_run(vlm, tmp_path / "anew", name, recipe=recipe(name, max_steps=2), **again).adapter
    assert all(np.isfinite(values).all() for values in second.losses.values())
