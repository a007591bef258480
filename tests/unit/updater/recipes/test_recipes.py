"""Recipes of ours and of third-party packages, trained, served, stopped and resumed."""

from __future__ import annotations

import logging
import math
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml

from core.errors import ConfigError
from serving.engines.clip_base import ClipBase
from serving.engines.lora import effective_weights
from tests.support.pages import Page
from tests.support.recipe_table import PAGE, missing, told
from tests.unit.updater.builders import assert_served_as_trained, pools, recipe, resumed, run
from updater.methods import objectives, regularizers
from updater.recipes import Recipe, load_recipe, plugin_registry, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_has_its_files_name_and_objectives_and_survives_yaml(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert objectives.build(recipe.objectives, recipe.family)
    odd = {"description": "ΔW\x85and\r\nlines\x00", "weight_decay": 1e-7, "replay_half_life": 3e20, "temperature": None}
    written = recipe.model_copy(update=odd)
    (tmp_path / "recipe.yaml").write_text(written.to_yaml(), encoding="utf-8")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == written and again.digest == written.digest


def test_the_digest_follows_what_is_computed_and_not_the_prose() -> None:
    recipe = load_recipe("default")
    assert recipe.model_copy(update={"description": "other words"}).digest == recipe.digest
    assert recipe.model_copy(update={"rank": recipe.rank + 1}).digest != recipe.digest


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rnak": 8}, "rnak"),
        ({"rank": 0}, "rank"),
        ({"mixture": {"reference": 0.5, "new": 0.4, "replay": 0.3}}, "mixture"),
        ({"schedule": {"kind": "sine"}}, r"schedule\.kind"),
        ({"image": {"locked": True}, "text": {"locked": True}}, "both towers are locked"),
        ({"name": "../escape"}, "name"),
        ({"family": "audio"}, "family"),
        ({"caption_templates": ["a photo"]}, r"caption_templates\.0"),
        ({"caption_templates": ["a {thing}"]}, r"caption_templates\.0"),
        ({"caption_templates": ["{}" + "x" * 200]}, r"caption_templates\.0"),
        ({"connector": {"locked": False}}, "no connector"),
        ({"micro_batch": 4, "gradients": {"harmonize": True}}, "micro_batch gives the gradient of the loss"),
        ({"family": "vlm", "text": {"locked": True}}, "nothing would learn"),
        ({"family": "vlm", "views": {"count": 2}}, "are of a CLIP"),
        ({"family": "vlm", "caption_templates": ["a {}"]}, "are of a CLIP"),
        ({"family": "vlm", "gradients": {"drop": 0.1}}, r"gradients\.drop"),
        ({"merge": {"rule": "none", "search": [0.5]}}, "merge.*search"),
        ({"merge": {"search": [0.5, 0.5]}}, "merge.*search"),
        ({"merge": {"search": [0.0, 1.0]}}, "merge.*search"),
        ({"schedule": {"peak": math.inf}}, r"schedule\.peak"),
        ({"objectives": [{"name": "contrastive", "options": {"size": math.nan}}]}, r"objectives\.0\.options\.size"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, object], named: str) -> None:
    values = load_recipe("default").model_dump(mode="json", exclude={"image"})
    with pytest.raises(ConfigError, match=named):
        Recipe.parse({**values, **change})


def test_an_unknown_recipe_objective_or_option_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bit-fit, .*default, .*naive, .*vlm-default, .*vlm-naive"):
        load_recipe("defualt")
    values = load_recipe("default").model_dump(mode="json")
    for term in ({"name": "contrastvie"}, {"name": "base"}, {"name": "contrastive", "options": {"tau": 1}}):
        recipe = Recipe.parse({**values, "objectives": [term]})
        with pytest.raises(ConfigError, match=str(term["name"])):
            objectives.build(recipe.objectives, recipe.family)


RESUMED = frozenset({"c-clip", "codyra", "default", "ewc", "finetuned-merge", "galore", "keep-lora", "si"})
"""Also stopped and resumed: one recipe for each kind of state in a checkpoint."""
OFTEN = {"codyra", "default", "finetuned-merge", "locked-image", "zscl"}
"""Those that each do something that no other of these does; the others take longer and run only in `make long`."""
CLIP = [
    pytest.param(name, marks=() if name in OFTEN else pytest.mark.long)
    for name in recipe_names()
    if load_recipe(name).family == "clip"
]


@pytest.mark.usefixtures("measured_once")
@pytest.mark.parametrize("name", CLIP)
def test_two_updates_in_a_row_change_what_may_change_and_are_served_as_trained(
    base: ClipBase, tmp_path: Path, name: str
) -> None:
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
        assert resumed(partial(run, base, tmp_path / "stopped", **again), 6).adapter == second.adapter
    assert all(np.isfinite(values).all() for values in second.losses.values())
    assert_served_as_trained(base, second)


def test_gradients_are_harmonized_without_a_parameter_that_no_longer_learns(base: ClipBase, tmp_path: Path) -> None:
    plan = recipe("keep-lora", max_steps=3, gradients={"harmonize": True}, objectives=[
        {"name": "contrastive"}, {"name": "feature_distillation"},
    ])  # fmt: skip
    assert_served_as_trained(base, run(base, tmp_path, recipe=plan))


def test_both_pages_have_a_row_for_each_recipe_as_it_is() -> None:
    assert not missing(), "add or replace these rows, and say when to use each:\n" + "\n".join(missing())
    methods = PAGE.parents[1].joinpath("methods.md").read_text()
    rows = [line.strip("|").split("|") for line in methods.splitlines() if line.startswith("| `")]
    named = [name for cells in rows for name in re.findall(r"`([a-z0-9._-]+)`", cells[0])]
    assert sorted(told()) == sorted(named) == recipe_names()
    assert all(len(cells) == 4 and all(cell.strip() for cell in cells) for cells in rows)


# Methods and recipes of other packages

Install = Callable[[str, Mapping[str, str], str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Leaves a package as `pip install` does: its name, the texts of its files, and its entry points."""
    names: list[str] = []

    def installed(name: str, files: Mapping[str, str], points: str) -> None:
        names.append(name)
        site, about = tmp_path / "site", f"{name}-1.0.dist-info"
        metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n"
        whole = {f"{name}/__init__.py": "", f"{name}/recipes/__init__.py": "", **files}
        for path, text in {**whole, f"{about}/METADATA": metadata, f"{about}/entry_points.txt": points}.items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_text(text)
        monkeypatch.syspath_prepend(site)
        plugin_registry._others.cache_clear()

    yield installed
    plugin_registry._others.cache_clear()
    for module in [module for module in sys.modules if module.partition(".")[0] in names]:
        del sys.modules[module]


def test_the_example_of_the_page_is_trained_and_served(install: Install, base: ClipBase, tmp_path: Path) -> None:
    files, points = {}, ""
    for block in Page(PAGE.with_name("write.md")).blocks:
        first, _, rest = block.text.partition("\n")
        if place := re.fullmatch(r"# (my_methods/[\w/-]+\.(?:py|yaml))", first):
            files[place[1]] = rest
        elif first == "# pyproject.toml":
            for group, names in tomllib.loads(rest)["project"]["entry-points"].items():
                points += f"[{group}]\n" + "".join(f"{name} = {where}\n" for name, where in names.items())
    install("my_methods", files, points)
    values = load_recipe("my-method").model_dump(mode="json")
    example = Recipe.parse({**values, "max_steps": 4, "batch_size": 9})
    before = run(base, tmp_path / "first", recipe=example)
    assert {"hinge", "feature_distillation", "l1"} <= set(before.losses)
    assert before.losses["l1"][0] == 0 < before.losses["l1"][-1]
    again = {"recipe": example, "pools": pools(replay=12), "incumbent": before.directory, "seed": 5}
    second = run(base, tmp_path / "second", **again)
    assert second.adapter != before.adapter
    assert_served_as_trained(base, second)
    assert resumed(partial(run, base, tmp_path / "stopped", **again), 6).adapter == second.adapter


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
def half(install: Install) -> None:
    """A package with a method, one that cannot be imported, and a recipe."""
    values = recipe("naive").model_dump(mode="json")
    terms = [{"name": "half_contrast", "weight": 1.0, "over": ["new"]}]
    text = yaml.safe_dump({**values, "name": "half", "objectives": terms})
    files = {"half_contrast.py": TERM, "broken.py": "import nothing_of_this_name\n"}
    files |= {"recipes/half.yaml": text, "recipes/default.yaml": text}
    install("example_methods", {f"example_methods/{name}": text for name, text in files.items()}, POINTS)


@pytest.mark.usefixtures("half")
def test_a_package_replaces_nothing_of_ours_and_ends_its_own_recipes_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert "half_contrast" in objectives.names("clip") and "half_contrast" not in objectives.names("vlm")
    assert "half" in recipe_names() and "none_at_all" in regularizers.REGULARIZERS.names()
    with caplog.at_level(logging.WARNING, "ratchet.recipes"):
        assert load_recipe("default").name == "default"
        kind = objectives.build(load_recipe("naive").objectives, "clip")[0][1]
    assert type(kind).__module__ == "updater.methods.objectives"
    assert "contrastive of example-methods is left out" in caplog.text and "recipe default of" in caplog.text
    assert "ratchet.recipes 'broken' of example-methods cannot be imported" in caplog.text
    assert "broken" not in objectives.names("clip")
    wrong = recipe("naive", objectives=[{"name": "broken", "weight": 1.0}])
    with pytest.raises(ConfigError, match="'broken' of example-methods cannot be imported: ModuleNotFoundError"):
        objectives.build(wrong.objectives, "clip")
    wrong = recipe("naive", regularizers=[{"name": "none_at_all", "weight": 1.0}], adapter={"kind": "full"})
    with pytest.raises(ConfigError, match="'none_at_all' of example-methods is not a Regularizer"):
        regularizers.build(wrong)
    assert objectives.build(load_recipe("default").objectives, "clip")
