"""docs/recipes.md: its table is that of the files, and its example is a method that really runs."""

from __future__ import annotations

import re
import tomllib
from functools import partial
from pathlib import Path

import pytest

from tests.support.pages import Page
from tests.support.recipe_table import PAGE, missing, told
from tests.support.tiny import tiny_base
from tests.unit.updater.builders import assert_served_as_trained, pools, resumed, run
from tests.unit.updater.recipes.conftest import Install
from updater.recipes import Recipe, load_recipe, recipe_names

METHODS = PAGE.with_name("methods.md")


def test_the_table_has_a_row_for_each_recipe_as_it_is() -> None:
    assert not missing(), "add or replace these rows, and say when to use each:\n" + "\n".join(missing())
    assert sorted(told()) == recipe_names()


def test_each_recipe_stands_beside_its_paper() -> None:
    """docs/methods.md: paper, what we have, what differs."""
    rows = [line.strip("|").split("|") for line in METHODS.read_text().splitlines() if line.startswith("| `")]
    named = [name for cells in rows for name in re.findall(r"`([a-z0-9._-]+)`", cells[0])]
    assert sorted(named) == recipe_names()
    assert all(len(cells) == 4 and all(cell.strip() for cell in cells) for cells in rows)


@pytest.fixture
def example(install: Install) -> Recipe:
    """The recipe of the page's example, whose files are installed."""
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
