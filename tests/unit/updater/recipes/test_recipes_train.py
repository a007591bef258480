from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.engines.clip_base import ClipBase
from serving.engines.lora import effective_weights
from tests.support.pages import Page
from tests.support.recipe_table import PAGE, missing, told
from tests.support.tiny import tiny_base
from tests.unit.updater.builders import assert_served_as_trained, pools, recipe, resumed, run
from tests.unit.updater.recipes.conftest import Install
from updater.budget.cost import Cost
from updater.recipes import Recipe, load_recipe, recipe_names
from updater.step.learner import AnyLearner
from updater.training.measure import measure

RESUMED = frozenset({"codyra", "default", "ewc", "finetuned-merge", "galore", "si"})
"""Also stopped and resumed: one recipe for each kind of state in a checkpoint."""
OFTEN = RESUMED | {"ema-merge", "locked-image", "naive", "replay", "wise-ft", "zscl"}
"""The recommended recipes; the others take as long again and run only in `make long`."""
CLIP = [
    pytest.param(name, marks=() if name in OFTEN else pytest.mark.long)
    for name in recipe_names()
    if load_recipe(name).family == "clip"
]


@pytest.mark.parametrize("name", CLIP)
def test_two_updates_in_a_row_change_what_may_change_and_are_served_as_trained(
    base: ClipBase, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("updater.training.plan.measure", _measured_once())
    plan = recipe(name, max_steps=3)
    first = run(base, tmp_path / "first", recipe=plan)
    changed = effective_weights(first.directory, base.build_model())
    assert any(name.startswith("visual.") for name in changed) != plan.image.locked
    assert any(not name.startswith("visual.") for name in changed) != plan.text.locked
    again = {"recipe": plan, "pools": pools(replay=12), "incumbent": first.directory, "seed": 5}
    again["carry_over"] = first.carry_over
    second = run(base, tmp_path / "second", **again)
    assert first.adapter != second.adapter
    if name in RESUMED:
        assert resumed(partial(run, base, tmp_path / "stopped", **again), 4).adapter == second.adapter
    assert all(np.isfinite(values).all() for values in second.losses.values())
    assert_served_as_trained(base, second)


def _measured_once() -> Callable[..., Cost]:
    """Measure updates of the same parts once; counting is more than half of the time of each."""
    found: dict[frozenset[str], Cost] = {}

    def measured(learner: AnyLearner, *arguments: Any) -> Cost:
        parts = frozenset(learner.parts)
        if parts not in found:
            found[parts] = measure(learner, *arguments)
        return found[parts]

    return measured


METHODS = PAGE.with_name("methods.md")


def test_the_table_has_a_row_for_each_recipe_as_it_is() -> None:
    assert not missing(), "add or replace these rows, and say when to use each:\n" + "\n".join(missing())
    assert sorted(told()) == recipe_names()


def test_methods_md_has_paper_ours_and_difference_of_each_recipe() -> None:
    rows = [line.strip("|").split("|") for line in METHODS.read_text().splitlines() if line.startswith("| `")]
    named = [name for cells in rows for name in re.findall(r"`([a-z0-9._-]+)`", cells[0])]
    assert sorted(named) == recipe_names()
    assert all(len(cells) == 4 and all(cell.strip() for cell in cells) for cells in rows)


@pytest.fixture
def example(install: Install) -> Recipe:
    files, points = {}, ""
    for block in Page(PAGE).blocks:
        first, _, rest = block.text.partition("\n")
        if place := re.fullmatch(r"# (my_methods/[\w/-]+\.(?:py|yaml))", first):
            files[place[1]] = rest
        elif first == "# pyproject.toml":
            for group, names in tomllib.loads(rest)["project"]["entry-points"].items():
                points += f"[{group}]\n" + "".join(f"{name} = {where}\n" for name, where in names.items())
    install("my_methods", files, points)
    values = load_recipe("my-method").model_dump(mode="json")
    return Recipe.parse({**values, "max_steps": 4, "batch_size": 9})


def test_the_example_is_trained_served_stopped_and_resumed(example: Recipe, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "home")
    first = run(base, tmp_path / "first", recipe=example)
    assert {"hinge", "feature_distillation", "l1"} <= set(first.losses)
    assert first.losses["l1"][0] == 0 < first.losses["l1"][-1]
    again = {"recipe": example, "pools": pools(replay=12), "incumbent": first.directory, "seed": 5}
    second = run(base, tmp_path / "second", **again)
    assert second.adapter != first.adapter
    assert_served_as_trained(base, second)
    stopped = resumed(partial(run, base, tmp_path / "stopped", **again), 4)
    assert stopped.adapter == second.adapter
