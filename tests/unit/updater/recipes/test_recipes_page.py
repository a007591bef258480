"""docs/recipes.md: its table is that of the files, and its example is a method that really runs."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from serving.engines.clip import ClipEngine
from tests.support.pages import Page
from tests.support.recipe_table import PAGE, missing, told
from tests.support.tiny import tiny_base
from tests.unit.updater.builders import picture, pools, run
from tests.unit.updater.recipes.conftest import Install
from updater.adapters import trainer_encoder
from updater.recipes import Recipe, load_recipe, recipe_names
from updater.training.workers import Stopped

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
    engine = ClipEngine(base)
    engine.load(second.adapter, second.directory)
    pixels = np.stack([base.preprocess.pixels(picture(i)) for i in range(4)])
    images, texts = trainer_encoder(base, second.directory)(pixels, ["a red car", "a tree"])
    assert np.allclose(images, engine.encode_images(pixels, second.adapter), atol=1e-5)
    assert np.allclose(texts, engine.encode_texts(["a red car", "a tree"], second.adapter), atol=1e-5)
    assert not np.allclose(images, engine.encode_images(pixels), atol=1e-5)
    with pytest.raises(Stopped):
        run(base, tmp_path / "stopped", **again, stop=_soon())
    assert run(base, tmp_path / "stopped", **again).adapter == second.adapter


def _soon() -> Callable[[], bool]:
    asked = count()
    return lambda: next(asked) >= 4
