"""Recipes are plain YAML that is checked before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import ConfigError
from updater.methods import objectives
from updater.recipes import Recipe, load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_has_its_files_name_and_survives_the_way_through_yaml(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    file = tmp_path / "copy.yaml"
    file.write_text(recipe.to_yaml())
    assert load_recipe(file) == recipe
    assert load_recipe(file).digest == recipe.digest
    assert objectives.build(recipe.objectives, recipe.family)


def test_the_image_tower_of_a_vlm_is_locked_unless_the_recipe_opens_it() -> None:
    values = load_recipe("vlm-default").model_dump(mode="json", exclude={"image"})
    assert Recipe.parse(values).image.locked
    assert not Recipe.parse({**values, "image": {}}).image.locked


def test_the_shipped_recipes_are_what_they_are_called() -> None:
    assert load_recipe("locked-image").image.locked and not load_recipe("locked-image").text.locked
    assert load_recipe("locked-text").text.locked and not load_recipe("locked-text").image.locked
    naive, default = load_recipe("naive"), load_recipe("default")
    assert naive.mixture.new == 1
    assert [term.name for term in naive.objectives] == ["contrastive"]
    assert (default.mixture.reference, default.mixture.new, default.mixture.replay) == (0.2, 0.6, 0.2)
    assert "feature_distillation" in [term.name for term in default.objectives]


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
        ({"objectives": []}, "objectives"),
        ({"precision": "float16"}, "precision"),
        ({"family": "audio"}, "family"),
        ({"caption_templates": ["a photo"]}, r"caption_templates\.0"),
        ({"caption_templates": ["{} and {}"]}, r"caption_templates\.0"),
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
    ],
)
def test_a_wrong_field_is_named(change: dict[str, object], named: str) -> None:
    values = load_recipe("default").model_dump(mode="json", exclude={"image"})
    with pytest.raises(ConfigError, match=named):
        Recipe.parse({**values, **change})


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"bit-fit, .*default, .*naive, .*vlm-default, .*vlm-naive"):
        load_recipe("defualt")


def test_an_unknown_objective_or_option_is_refused() -> None:
    values = load_recipe("default").model_dump(mode="json")
    for term in ({"name": "contrastvie"}, {"name": "base"}, {"name": "contrastive", "options": {"tau": 1}}):
        recipe = Recipe.parse({**values, "objectives": [term]})
        with pytest.raises(ConfigError, match=str(term["name"])):
            objectives.build(recipe.objectives, recipe.family)
