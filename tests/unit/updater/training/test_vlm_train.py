"""One update on a tiny VLM: the same course as a CLIP's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import BudgetError, ConfigError, TrainingError
from serving.engines.lora import effective_weights
from serving.engines.vlm.vlm_base import VlmBase
from tests.support.tiny import tiny_base
from tests.support.tiny_vlm import tiny_vlm_base
from tests.unit.updater.builders import LIMITS, pools, question_pools, recipe, run
from updater.data.pools import Pools, Question
from updater.training.result import TrainResult
from updater.training.workers import Stopped

FAST = {"kind": "infinite", "peak": 0.02, "constant": 0.02, "final": 0.02, "warmup_steps": 1, "cooldown_steps": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> VlmBase:
    return tiny_vlm_base(tmp_path_factory.mktemp("home"))


def vlm_run(base: VlmBase, folder: Path, name: str = "vlm-default", **options: Any) -> TrainResult:
    given = {"pools": question_pools(), "recipe": recipe(name), **options}
    return run(base, folder, **given)


def test_training_lowers_the_loss_and_writes_an_adapter_of_the_language_model(base: VlmBase, tmp_path: Path) -> None:
    result = vlm_run(base, tmp_path, recipe=recipe("vlm-naive", max_steps=15, batch_size=12, schedule=FAST))
    losses = result.losses["answer_likelihood"]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 1
    assert result.adapter.startswith("vlm-") and result.directory.name == result.adapter
    changed = effective_weights(result.directory, base.build_model())
    assert changed and {base.part_of(name.removesuffix(".weight")) for name in changed} == {"text"}


def test_the_same_inputs_give_the_same_adapter_and_others_another(base: VlmBase, tmp_path: Path) -> None:
    one = vlm_run(base, tmp_path / "one").adapter
    assert vlm_run(base, tmp_path / "two").adapter == one
    assert vlm_run(base, tmp_path / "seed", seed=4).adapter != one
    assert vlm_run(base, tmp_path / "data", pools=question_pools(new=14)).adapter != one


@pytest.mark.parametrize("eyes", [{}, {"image": {"locked": False}}])
def test_a_stopped_update_goes_on_and_ends_in_the_same_adapter(
    base: VlmBase, tmp_path: Path, eyes: dict[str, Any]
) -> None:
    first = vlm_run(base, tmp_path / "first")
    term = {"name": "token_distillation", "over": ["reference"], "options": {"teacher": "incumbent"}}
    plan = recipe("vlm-default", objectives=[{"name": "answer_likelihood"}, term], **eyes)
    whole = vlm_run(base, tmp_path / "whole", recipe=plan, incumbent=first.directory)
    asked = 0

    def stop_at_third_question() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3  # after the only chunk of preparation: between steps

    stops = 0
    for _ in range(20):
        asked = 0
        try:
            resumed = vlm_run(
                base, tmp_path / "parts", recipe=plan, incumbent=first.directory, stop=stop_at_third_question
            )
            break
        except Stopped:
            stops += 1
    assert stops >= 2
    assert resumed.adapter == whole.adapter
    assert resumed.losses == whole.losses


def test_an_update_goes_on_from_the_incumbent_and_merges_with_it(base: VlmBase, tmp_path: Path) -> None:
    first = vlm_run(base, tmp_path / "first")
    still = {"peak": 1e-9, "constant": 1e-9, "final": 1e-9}
    second = vlm_run(base, tmp_path / "second", incumbent=first.directory, recipe=recipe("vlm-default", schedule=still))
    model = base.build_model()
    before, after = (effective_weights(result.directory, model) for result in (first, second))
    assert before.keys() == after.keys()
    assert all(bool((after[name] - weight).abs().max() < 1e-6) for name, weight in before.items())


def test_distillation_holds_the_reference_answers_where_they_were(base: VlmBase, tmp_path: Path) -> None:
    """With the teacher's weight the divergence on reference questions ends far below where it ends without."""
    drift = {}
    for weight in (1e-6, 20.0):
        terms = [
            {"name": "answer_likelihood", "over": ["new"]},
            {"name": "token_distillation", "weight": weight, "over": ["reference"]},
        ]
        result = vlm_run(
            base,
            tmp_path / str(weight),
            recipe=recipe("vlm-default", objectives=terms, max_steps=25, batch_size=12, schedule=FAST),
        )
        drift[weight] = float(np.mean(result.losses["token_distillation"][-3:]))
    assert drift[20.0] < 0.3 * drift[1e-6]


def test_the_budget_decides_the_number_of_steps(base: VlmBase, tmp_path: Path) -> None:
    one, two = (vlm_run(base, tmp_path / f"{n}", recipe=recipe("vlm-default", max_steps=n)) for n in (1, 2))
    per_step = two.cost["maf_per_step"]
    enough_for_two = two.maf + 0.1 * per_step
    bound = vlm_run(base, tmp_path / "bound", limits=replace(LIMITS, gflops=enough_for_two))
    assert (bound.steps, bound.planned_steps) == (2, 2)
    with pytest.raises(BudgetError, match="does not pay for one step"):
        vlm_run(base, tmp_path / "poor", limits=replace(LIMITS, gflops=one.maf - 0.5 * per_step))


def test_what_cannot_be_asked_is_left_out_and_nothing_left_is_an_error(base: VlmBase, tmp_path: Path) -> None:
    good = question_pools(new=20)
    bad = Question("bad", "where is <image>?", "there", good.new[0].read)
    with_bad = vlm_run(base, tmp_path / "bad", pools=Pools((bad, *good.new), good.reference))
    assert (with_bad.samples["new"], with_bad.pending, with_bad.visited) == (15, 21, 15)
    assert with_bad.adapter == vlm_run(base, tmp_path / "good", pools=good).adapter
    with pytest.raises(TrainingError, match="no new sample"):
        vlm_run(base, tmp_path / "none", pools=Pools((bad,), good.reference))


def test_a_recipe_of_the_other_family_is_refused(base: VlmBase, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'default' trains a CLIP"):
        run(base, tmp_path, pools=pools())
    with pytest.raises(ConfigError, match="'vlm-default' trains a VLM"):
        run(tiny_base(tmp_path), tmp_path, recipe=recipe("vlm-default"), pools=question_pools())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vlm-logit-swap", "text"),
        ("vlm-orthogonal", "text"),
        pytest.param("vlm-sdft", "text", marks=pytest.mark.long),
        ("vlm-connector", "connector"),
    ],
)
def test_each_other_recipe_trains_two_updates_of_its_part(base: VlmBase, tmp_path: Path, name: str, part: str) -> None:
    first = vlm_run(base, tmp_path / "first", name, recipe=recipe(name, max_steps=3))
    changed = effective_weights(first.directory, base.build_model())
    assert changed and {base.part_of(each.removesuffix(".weight")) for each in changed} == {part}
    again = {"incumbent": first.directory, "carry_over": first.carry_over, "seed": 5}
    second = vlm_run(base, tmp_path / "second", name, recipe=recipe(name, max_steps=3), **again)
    assert second.adapter != first.adapter
    assert second.adapter == vlm_run(base, tmp_path / "anew", name, recipe=recipe(name, max_steps=3), **again).adapter
    assert all(np.isfinite(values).all() for values in second.losses.values())
