from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml

from core.errors import ConfigError
from tests.support.tiny import tiny_base
from tests.unit.updater.builders import recipe, run
from tests.unit.updater.recipes.conftest import Install
from updater.adapters import kinds
from updater.methods import merging, objectives, optimizers, regularizers
from updater.recipes import load_recipe, recipe_names

TERM = """
from updater.methods.objectives import Contrastive

class Half(Contrastive):
    def __call__(self, batch):
        return 0.5 * super().__call__(batch)
"""
POINTS = """
[ratchet.objectives]
half_contrast = example_methods.half_contrast:Half
broken = example_methods.broken:Half
contrastive = example_methods.half_contrast:Half

[ratchet.regularizers]
none_at_all = example_methods.half_contrast:Half

[ratchet.recipes]
example = example_methods.recipes
broken = example_methods.broken
"""


@pytest.fixture(autouse=True)
def example(install: Install) -> None:
    """A package with a method, one that cannot be imported, and a recipe."""
    values = recipe("naive").model_dump(mode="json")
    terms = [{"name": "half_contrast", "weight": 1.0, "over": ["new"]}]
    half = yaml.safe_dump({**values, "name": "half", "objectives": terms})
    files = {"half_contrast.py": TERM, "broken.py": "import nothing_of_this_name\n"}
    files |= {"recipes/half.yaml": half, "recipes/default.yaml": half}
    install("example_methods", {f"example_methods/{name}": text for name, text in files.items()}, POINTS)


def test_its_methods_and_recipes_have_names_beside_ours() -> None:
    assert "half_contrast" in objectives.names("clip") and "half_contrast" not in objectives.names("vlm")
    assert "half" in recipe_names() and "none_at_all" in regularizers.REGULARIZERS.names()
    for methods in (merging.RULES, optimizers.OPTIMIZERS, kinds.KINDS):
        names = methods.names()
        assert names == sorted(set(names)) and "half_contrast" not in names


def test_an_update_is_trained_by_its_recipe(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "home")
    mine = run(base, tmp_path / "mine", recipe=load_recipe("half"))
    plain = run(base, tmp_path / "plain", recipe=recipe("naive"))
    assert mine.losses["half_contrast"][0] == pytest.approx(0.5 * plain.losses["contrastive"][0])


def test_what_ratchet_has_is_not_replaced(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ratchet.recipes"):
        assert load_recipe("default").name == "default"
        kind = objectives.build(load_recipe("naive").objectives, "clip")[0][1]
    assert type(kind).__module__ == "updater.methods.objectives"
    assert "contrastive of example-methods is left out" in caplog.text
    assert "recipe default of" in caplog.text
    assert "ratchet.recipes 'broken' of example-methods cannot be imported" in caplog.text


def test_one_that_cannot_be_imported_ends_the_recipes_that_name_it_alone() -> None:
    assert "broken" not in objectives.names("clip")
    wrong = recipe("naive", objectives=[{"name": "broken", "weight": 1.0}])
    with pytest.raises(ConfigError, match="'broken' of example-methods cannot be imported: ModuleNotFoundError"):
        objectives.build(wrong.objectives, "clip")
    assert objectives.build(load_recipe("default").objectives, "clip")


def test_one_that_is_not_what_its_group_wants_is_said_so() -> None:
    term = {"name": "none_at_all", "weight": 1.0}
    with pytest.raises(ConfigError, match="'none_at_all' of example-methods is not a Regularizer"):
        regularizers.build(recipe("naive", regularizers=[term], adapter={"kind": "full"}))
