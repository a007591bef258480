"""docs/recipes.md: its table is that of the files, and its example is a method that really runs."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from serving.engines.clip import ClipEngine
from tests.support.pages import Page
from tests.support.recipe_table import PAGE, missing, told
from tests.support.tiny import tiny_base
from tests.unit.updater.builders import picture, pools, run
from updater.adapters import trainer_encoder
from updater.recipes import Recipe, load_recipe, recipe_names
from updater.training.workers import Stopped

METHODS = PAGE.with_name("methods.md")


def test_the_table_has_a_row_for_each_recipe_as_it_is() -> None:
    assert not missing(), "add or replace these rows, and say when to use each:\n" + "\n".join(missing())
    assert sorted(told()) == recipe_names()


def test_each_row_says_when_to_use_it() -> None:
    for name, line in told().items():
        assert len(line.strip("|").split("|")[-1].strip()) > 10, name


def test_each_recipe_stands_beside_its_paper() -> None:
    """docs/methods.md: paper, what we have, what differs."""
    rows = [line.strip("|").split("|") for line in METHODS.read_text().splitlines() if line.startswith("| `")]
    named = [name for cells in rows for name in re.findall(r"`([a-z0-9._-]+)`", cells[0])]
    assert sorted(named) == recipe_names()
    assert all(len(cells) == 4 and all(cell.strip() for cell in cells) for cells in rows)


def _files() -> dict[str, str]:
    """Files of the example, by the path in their first line."""
    found = {}
    for block in Page(PAGE).blocks:
        first, _, rest = block.text.partition("\n")
        if place := re.fullmatch(r"# ([\w/-]+\.(?:py|yaml))", first):
            found[place[1]] = rest
    return found


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recipe]:
    """The example's recipe, with its files where a package looks for them."""
    before = set(sys.modules)
    for name, text in _files().items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        if file.suffix == ".py":
            package = importlib.import_module(name.rpartition("/")[0].replace("/", "."))
            monkeypatch.setattr(package, "__path__", [*package.__path__, str(file.parent)])
    importlib.invalidate_caches()
    values = load_recipe(tmp_path / "my-method.yaml").model_dump(mode="json")
    yield Recipe.parse({**values, "max_steps": 4, "batch_size": 9})
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_the_example_is_whole() -> None:
    folders = {name.rpartition("/")[0] for name in _files()}
    assert folders == {
        "updater/objectives", "updater/regularizers", "updater/adapters/parametrizations", "updater/merging",
        "updater/optimizers", "",
    }  # fmt: skip


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
