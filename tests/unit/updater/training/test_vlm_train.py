"""One update on a tiny VLM: the same course as a CLIP's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import ConfigError, TrainingError
from serving.engines.lora import effective_weights
from serving.engines.vlm.vlm_base import VlmBase
from tests.support.tiny import tiny_base
from tests.unit.updater.builders import pools, question_pools, recipe, run
from updater.data.pools import Pools, Question
from updater.training.result import TrainResult

FAST = {"kind": "infinite", "peak": 0.02, "constant": 0.02, "final": 0.02, "warmup_steps": 1, "cooldown_steps": 1}


def vlm_run(vlm: VlmBase, folder: Path, name: str = "vlm-default", **options: Any) -> TrainResult:
    given = {"pools": question_pools(), "recipe": recipe(name), **options}
    return run(vlm, folder, **given)


def test_training_lowers_the_loss_and_writes_an_adapter_of_the_language_model(vlm: VlmBase, tmp_path: Path) -> None:
    result = vlm_run(vlm, tmp_path, recipe=recipe("vlm-naive", max_steps=15, batch_size=12, schedule=FAST))
    losses = result.losses["answer_likelihood"]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 1
    assert result.adapter.startswith("vlm-") and result.directory.name == result.adapter
    changed = effective_weights(result.directory, vlm.build_model())
    assert changed and {vlm.part_of(name.removesuffix(".weight")) for name in changed} == {"text"}


def test_distillation_holds_the_reference_answers_where_they_were(vlm: VlmBase, tmp_path: Path) -> None:
    """With the teacher's weight the divergence on reference questions ends far below where it ends without."""
    drift = {}
    for weight in (1e-6, 20.0):
        terms = [
            {"name": "answer_likelihood", "over": ["new"]},
            {"name": "token_distillation", "weight": weight, "over": ["reference"]},
        ]
        result = vlm_run(
            vlm,
            tmp_path / str(weight),
            recipe=recipe("vlm-default", objectives=terms, max_steps=25, batch_size=12, schedule=FAST),
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


def test_a_recipe_of_the_other_family_is_refused(vlm: VlmBase, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'default' trains a CLIP"):
        run(vlm, tmp_path, pools=pools())
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
def test_each_other_recipe_trains_two_updates_of_its_part(vlm: VlmBase, tmp_path: Path, name: str, part: str) -> None:
    first = vlm_run(vlm, tmp_path / "first", name, recipe=recipe(name, max_steps=3))
    changed = effective_weights(first.directory, vlm.build_model())
    assert changed and {vlm.part_of(each.removesuffix(".weight")) for each in changed} == {part}
    again = {"incumbent": first.directory, "carry_over": first.carry_over, "seed": 5}
    second = vlm_run(vlm, tmp_path / "second", name, recipe=recipe(name, max_steps=3), **again)
    assert second.adapter != first.adapter
    assert second.adapter == vlm_run(vlm, tmp_path / "anew", name, recipe=recipe(name, max_steps=3), **again).adapter
    assert all(np.isfinite(values).all() for values in second.losses.values())
