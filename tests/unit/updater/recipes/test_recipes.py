from __future__ import annotations

import math
from pathlib import Path

import pytest

from core.errors import ConfigError
from updater.methods import objectives
from updater.recipes import Recipe, load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_has_its_files_name_objectives_that_there_are_and_survives_yaml(
    name: str, tmp_path: Path
) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert objectives.build(recipe.objectives, recipe.family)
    odd = {"description": "ΔW\x85and\r\nlines\x00", "weight_decay": 1e-7, "replay_half_life": 3e20, "temperature": None}
    written = recipe.model_copy(update=odd)
    (tmp_path / "recipe.yaml").write_text(written.to_yaml(), encoding="utf-8")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == written and again.digest == written.digest


def test_the_image_tower_of_a_vlm_is_locked_unless_the_recipe_opens_it() -> None:
    values = load_recipe("vlm-default").model_dump(mode="json", exclude={"image"})
    assert Recipe.parse(values).image.locked
    assert not Recipe.parse({**values, "image": {}}).image.locked


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
