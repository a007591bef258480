"""Methods and recipes of an installed package of somebody else, without a change of ours."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from core.errors import ConfigError
from tests.support.tiny import tiny_base
from tests.unit.updater.builders import recipe, run
from updater.adapters import parametrizations
from updater.methods import merging, objectives, optimizers, regularizers
from updater.recipes import load_recipe, plugin_registry, recipe_names

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


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What `pip install` leaves of a package: its folder, and what it says of itself."""
    site = tmp_path / "site"
    package, about = site / "example_methods", site / "example_methods-1.0.dist-info"
    (package / "recipes").mkdir(parents=True)
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: example-methods\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(POINTS)
    for init in (package, package / "recipes"):
        (init / "__init__.py").touch()
    (package / "half_contrast.py").write_text(TERM)
    (package / "broken.py").write_text("import nothing_of_this_name\n")
    values = recipe("naive").model_dump(mode="json")
    half = {**values, "name": "half", "objectives": [{"name": "half_contrast", "weight": 1.0, "over": ["new"]}]}
    (package / "recipes" / "half.yaml").write_text(yaml.safe_dump(half))
    (package / "recipes" / "default.yaml").write_text(yaml.safe_dump(half))
    monkeypatch.syspath_prepend(site)
    plugin_registry._others.cache_clear()
    yield package
    plugin_registry._others.cache_clear()
    for name in [name for name in sys.modules if name.startswith("example_methods")]:
        del sys.modules[name]


def test_its_methods_and_recipes_have_names_beside_ours(example: Path) -> None:
    assert "half_contrast" in objectives.names("clip") and "half_contrast" not in objectives.names("vlm")
    assert "half" in recipe_names() and "none_at_all" in regularizers.REGULARIZERS.names()
    for methods in (merging.RULES, optimizers.OPTIMIZERS, parametrizations.PARAMETRIZATIONS):
        names = methods.names()
        assert names == sorted(set(names)) and "half_contrast" not in names


def test_an_update_is_trained_by_its_recipe(example: Path, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "home")
    mine = run(base, tmp_path / "mine", recipe=load_recipe("half"))
    plain = run(base, tmp_path / "plain", recipe=recipe("naive"))
    assert mine.losses["half_contrast"][0] == pytest.approx(0.5 * plain.losses["contrastive"][0])


def test_what_ratchet_has_is_not_replaced(example: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ratchet.recipes"):
        assert load_recipe("default").name == "default"
        kind = objectives.build(load_recipe("naive").objectives, "clip")[0][1]
    assert type(kind).__module__ == "updater.methods.objectives"
    assert "contrastive of example-methods is left out" in caplog.text
    assert "recipe default of" in caplog.text
    assert "ratchet.recipes 'broken' of example-methods cannot be imported" in caplog.text


def test_one_that_cannot_be_imported_ends_the_recipes_that_name_it_alone(example: Path) -> None:
    assert "broken" not in objectives.names("clip")
    wrong = recipe("naive", objectives=[{"name": "broken", "weight": 1.0}])
    with pytest.raises(ConfigError, match="'broken' of example-methods cannot be imported: ModuleNotFoundError"):
        objectives.build(wrong.objectives, "clip")
    assert objectives.build(load_recipe("default").objectives, "clip")


def test_one_that_is_not_what_its_group_wants_is_said_so(example: Path) -> None:
    term = {"name": "none_at_all", "weight": 1.0}
    with pytest.raises(ConfigError, match="'none_at_all' of example-methods is not a Regularizer"):
        regularizers.build(recipe("naive", regularizers=[term], adapter={"kind": "full"}))
