from __future__ import annotations

import math
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from annotated_types import MinLen, Predicate
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from core.errors import ConfigError
from updater.methods import objectives
from updater.recipes import Mixture, Recipe, load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_has_its_files_name_and_objectives_that_there_are(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert objectives.build(recipe.objectives, recipe.family)


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


def any_of(annotation: Any, bounds: tuple[Any, ...] = ()) -> st.SearchStrategy[Any]:
    """Values of a field's type within the bounds of its pydantic field."""
    parts = get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return st.one_of([any_of(part, () if part is NoneType else bounds) for part in parts])
    if get_origin(annotation) is Annotated:
        return any_of(parts[0], parts[1:])
    if annotation is Mixture:
        return shares()
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return model(annotation)
    if get_origin(annotation) is tuple:
        least = max((bound.min_length for bound in bounds if isinstance(bound, MinLen)), default=0)
        return st.lists(any_of(parts[0]), min_size=least, max_size=least + 2).map(tuple)
    if get_origin(annotation) is dict:
        return st.dictionaries(any_of(parts[0]), any_of(parts[1]), max_size=3)
    for bound in bounds:
        if pattern := getattr(bound, "pattern", None):
            return st.from_regex(pattern.removesuffix("$"), fullmatch=True)
    if annotation is float:
        bounds = (*bounds, Predicate(math.isfinite))
    whole: Any = Annotated[annotation, *bounds] if bounds else annotation
    return st.from_type(whole)


def model(kind: type[BaseModel]) -> st.SearchStrategy[BaseModel]:
    """Valid models; fields that have a default are given or left out."""
    drawn = {name: any_of(field.annotation, tuple(field.metadata)) for name, field in kind.model_fields.items()}
    needed = {name for name, field in kind.model_fields.items() if field.is_required()}

    def valid(values: dict[str, Any]) -> BaseModel | None:
        try:
            return kind.model_validate(values)
        except ValidationError:  # some do not go together
            return None

    values = st.fixed_dictionaries(
        {name: drawn[name] for name in needed}, optional={name: drawn[name] for name in drawn if name not in needed}
    )
    return values.map(valid).filter(lambda made: made is not None)  # type: ignore[return-value]


def shares() -> st.SearchStrategy[Mixture]:
    """Three shares that add up to 1, up to rounding."""
    some = st.floats(0, 1)
    return st.tuples(some, some).map(sorted).filter(lambda cuts: cuts[1] > cuts[0]).map(
        lambda cuts: Mixture(reference=cuts[0], new=cuts[1] - cuts[0], replay=1 - cuts[1])
    )  # fmt: skip


def test_any_recipe_survives_the_way_through_yaml(tmp_path: Path) -> None:
    seen: dict[str, set[str]] = {name: set() for name in Recipe.model_fields}
    file = tmp_path / "recipe.yaml"

    @settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(model(Recipe))
    @example(load_recipe("default").model_copy(update={"description": "ΔW\x85and\r\nlines\x00"}))
    def survives(recipe: Recipe) -> None:
        file.write_text(recipe.to_yaml(), encoding="utf-8")
        again = load_recipe(file)
        assert again == recipe and again.digest == recipe.digest
        for name in seen:
            seen[name].add(repr(getattr(recipe, name)))

    survives()
    assert {name for name, values in seen.items() if len(values) < 2} == set(), "a field that was left at its default"
