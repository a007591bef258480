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
from tests.unit.updater.builders import LIMITS, pools, question_pools, recipe, resumed, run
from updater.adapters import Dense, LowRank, read_delta
from updater.adapters.weight_deltas import kept_share
from updater.data.pools import Pools, Question
from updater.recipes import Recipe
from updater.step.learner import AnyLearner, Learner
from updater.training import checkpoint, trainer
from updater.training.checkpoint import CARRY_OVER, CarryOver, load_checkpoint
from updater.training.result import TrainResult


class Kind(NamedTuple):
    """A family: its recipes, the term of the loss that learns, and data."""

    base: ClipBase | VlmBase
    name: str
    naive: str
    term: str
    pools: Callable[..., Pools]

    def train(self, folder: Path, **options: Any) -> TrainResult:
        return run(self.base, folder, **{"recipe": self.recipe(), "pools": self.pools(), **options})

    def recipe(self, **changes: Any) -> Recipe:
        return recipe(self.name, **changes)


@pytest.fixture(scope="module", params=["clip", "vlm"])
def kind(request: pytest.FixtureRequest, base: ClipBase, vlm: VlmBase) -> Kind:
    if request.param == "vlm":
        return Kind(vlm, "vlm-default", "vlm-naive", "answer_likelihood", question_pools)
    return Kind(base, "default", "naive", "contrastive", pools)


@pytest.fixture(scope="module")
def first(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return kind.train(tmp_path_factory.mktemp("first"))


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
    assert all(torch.allclose(after[name], weight, atol=1e-6) for name, weight in before.items())


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


def test_training_lowers_the_loss(kind: Kind, tmp_path: Path) -> None:
    fast = {"kind": "infinite", "peak": 0.02, "constant": 0.02, "final": 0.02, "warmup_steps": 1, "cooldown_steps": 1}
    result = kind.train(tmp_path, recipe=recipe(kind.naive, max_steps=12, batch_size=12, schedule=fast))
    losses = result.losses[kind.term]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1
    assert result.directory.name == result.adapter


def test_a_checkpoint_that_is_damaged_or_of_another_run_is_not_taken_and_a_full_disk_is_no_fault_of_the_update(
    base: ClipBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(base, tmp_path / "undisturbed").adapter
    run(base, tmp_path, seed=4)
    assert load_checkpoint(tmp_path / "work", "another run") is None
    assert run(base, tmp_path).adapter == expected
    file = tmp_path / "work" / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    assert run(base, tmp_path).adapter == expected
    full = Mock(side_effect=SafetensorError("I/O error: No space left on device (os error 28)"))
    with monkeypatch.context() as small, pytest.raises(DiskFull, match="No space left"):
        small.setattr(checkpoint, "save_file", full)
        run(base, tmp_path / "full")
    assert run(base, tmp_path / "full").adapter == expected


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
def test_a_locked_tower_keeps_the_space_of_an_incumbent_that_changed_it(
    base: ClipBase, tmp_path: Path, which: str
) -> None:
    first, engine = run(base, tmp_path / "first"), ClipEngine(base)
    made = run(base, tmp_path / "next", recipe=recipe(f"locked-{which}", max_steps=2), incumbent=first.directory)
    before, now = (engine.load(each.adapter, each.directory) for each in (first, made))
    assert getattr(now, which) == getattr(before, which) != getattr(base.spaces, which) and now != before


def test_the_wall_clock_bound_is_recorded(base: ClipBase, tmp_path: Path) -> None:
    result = run(base, tmp_path, limits=replace(LIMITS, seconds=1e-6))
    assert (result.truncated, result.steps, result.planned_steps) == (True, 1, 5)


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


def test_what_cannot_be_asked_is_left_out_and_nothing_left_or_another_family_is_an_error(
    base: ClipBase, vlm: VlmBase, tmp_path: Path
) -> None:
    good, plan = question_pools(new=20), recipe("vlm-default")
    bad = Question("bad", "where is <image>?", "there", good.new[0].read)
    with_bad = run(vlm, tmp_path / "bad", recipe=plan, pools=Pools((bad, *good.new), good.reference))
    assert (with_bad.samples["new"], with_bad.pending, with_bad.visited) == (15, 21, 15)
    assert with_bad.adapter == run(vlm, tmp_path / "good", recipe=plan, pools=good).adapter
    with pytest.raises(TrainingError, match="no new sample"):
        run(vlm, tmp_path / "none", recipe=plan, pools=Pools((bad,), good.reference))
    with pytest.raises(ConfigError, match="'default' trains a CLIP"):
        run(vlm, tmp_path, pools=pools())
    with pytest.raises(ConfigError, match="'vlm-default' trains a VLM"):
        run(base, tmp_path, recipe=plan, pools=good)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vlm-default", "text"),
        ("vlm-logit-swap", "text"),
        ("vlm-orthogonal", "text"),
        pytest.param("vlm-sdft", "text", marks=pytest.mark.long),
        ("vlm-connector", "connector"),
    ],
)
def test_each_recipe_of_a_vlm_trains_two_updates_of_its_part(
    vlm: VlmBase, tmp_path: Path, name: str, part: str
) -> None:
    given = {"recipe": recipe(name, max_steps=2), "pools": question_pools()}
    first = run(vlm, tmp_path / "first", **given)
    changed = effective_weights(first.directory, vlm.build_model())
    assert changed and {vlm.part_of(each.removesuffix(".weight")) for each in changed} == {part}
    given |= {"incumbent": first.directory, "carry_over": first.carry_over, "seed": 5}
    second = run(vlm, tmp_path / "second", **given)
    assert second.adapter.startswith("vlm-") and second.adapter != first.adapter
    assert second.adapter == run(vlm, tmp_path / "anew", **given).adapter
    assert all(np.isfinite(values).all() for values in second.losses.values())


# What an update leaves to the next one


def test_a_memory_survives_its_file_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    start = {
        "visual.a.b": LowRank(torch.rand(2, 3, dtype=torch.float64), torch.rand(4, 2, dtype=torch.float64)),
        "text.ln.weight": Dense(torch.rand(5, dtype=torch.float64)),
    }
    kept = CarryOver(start, {"objective.x/y": torch.arange(3)}, updates=7)
    assert kept.write(tmp_path / "kept") == tmp_path / "kept"
    found = CarryOver.read(tmp_path / "kept")
    assert found.digest == kept.digest != replace(kept, updates=8).digest
    assert (found.updates, set(found.start), set(found.terms)) == (7, set(start), {"objective.x/y"})
    for name, part in start.items():
        pairs = zip(part.tensors(), found.start[name].tensors(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    assert CarryOver().write(tmp_path / "none") is None and not (tmp_path / "none").exists()
    (tmp_path / CARRY_OVER).write_bytes(b"damaged")
    with pytest.raises(TrainingError, match="cannot be read"):
        CarryOver.read(tmp_path)


def test_the_number_of_updates_is_counted_along_the_chain(
    base: ClipBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Mock(side_effect=trainer.learning_rate)
    monkeypatch.setattr(trainer, "learning_rate", watched)
    falling = {"kind": "rsqrt", "peak": 1e-3, "warmup_steps": 1, "anneal_steps": 0, "updates": "rsqrt"}
    plan = recipe("rsqrt", max_steps=4, schedule=falling)
    incumbent = memory = None
    for update in range(2):
        done = run(base, tmp_path / str(update), recipe=plan, incumbent=incumbent, carry_over=memory, seed=update)
        incumbent, memory = done.directory, done.carry_over
        assert memory is not None and CarryOver.read(memory).updates == update + 1
    assert [call.args[-1] for call in watched.call_args_list] == [0] * 4 + [1] * 4


def test_only_a_recipe_that_goes_on_from_what_was_trained_starts_there(base: ClipBase, tmp_path: Path) -> None:
    first = run(base, tmp_path / "first", recipe=recipe("finetuned-merge", max_steps=3))
    after = {"incumbent": first.directory, "pools": pools(replay=12), "seed": 5}

    def second(name: str, memory: Path | None) -> str:
        plan = recipe(name, max_steps=3)
        return run(base, tmp_path / f"{name}-{memory is None}", recipe=plan, carry_over=memory, **after).adapter

    assert second("finetuned-merge", first.carry_over) != second("finetuned-merge", None)
    assert second("ema-merge", first.carry_over) == second("ema-merge", None)
