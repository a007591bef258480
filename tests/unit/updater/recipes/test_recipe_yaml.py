"""Any recipe that can be written down is read back as the same one. New fields are covered by themselves."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from annotated_types import MinLen, Predicate
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from core.errors import ConfigError
from updater.recipes import Mixture, Recipe, load_recipe


def any_of(annotation: Any, bounds: tuple[Any, ...] = ()) -> st.SearchStrategy[Any]:
    """Values of a field's type within the bounds that pydantic was told."""
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


def fields(kind: type[BaseModel]) -> st.SearchStrategy[dict[str, Any]]:
    """Values for the fields of a model; those that have a default are given or left out."""
    drawn = {name: any_of(field.annotation, tuple(field.metadata)) for name, field in kind.model_fields.items()}
    needed = {name for name, field in kind.model_fields.items() if field.is_required()}
    return st.fixed_dictionaries(
        {name: drawn[name] for name in needed}, optional={name: drawn[name] for name in drawn if name not in needed}
    )


def valid(kind: type[BaseModel], values: dict[str, Any]) -> BaseModel | None:
    """The model of these values, or None where some do not go together."""
    try:
        return kind.model_validate(values)
    except ValidationError:
        return None


def model(kind: type[BaseModel]) -> st.SearchStrategy[BaseModel]:
    """Valid models."""
    return fields(kind).map(lambda values: valid(kind, values)).filter(lambda made: made is not None)  # type: ignore[return-value]


def shares() -> st.SearchStrategy[Mixture]:
    """Three shares that add up to 1, up to rounding."""
    some = st.floats(0, 1)
    return st.tuples(some, some).map(sorted).filter(lambda cuts: cuts[1] > cuts[0]).map(
        lambda cuts: Mixture(reference=cuts[0], new=cuts[1] - cuts[0], replay=1 - cuts[1])
    )  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(model(Recipe))
@example(load_recipe("default").model_copy(update={"description": "ΔW\x85and\r\nlines\x00"}))
def test_any_recipe_survives_the_way_through_yaml(recipe: Recipe) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(recipe.to_yaml(), encoding="utf-8")
        again = load_recipe(file)
    assert again == recipe
    assert again.digest == recipe.digest


def test_the_recipes_that_are_tried_set_every_field() -> None:
    """Otherwise the test above could pass by leaving a field at its default."""
    seen: dict[str, set[str]] = {name: set() for name in Recipe.model_fields}

    @settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(model(Recipe))
    def look(recipe: Recipe) -> None:
        for name in seen:
            seen[name].add(repr(getattr(recipe, name)))

    look()
    assert {name for name, values in seen.items() if len(values) < 2} == set()


@pytest.mark.parametrize("number", [math.inf, math.nan])
def test_a_number_that_is_not_finite_is_refused_by_name(number: float) -> None:
    values = load_recipe("default").model_dump(mode="json")
    with pytest.raises(ConfigError, match=r"schedule\.peak"):
        Recipe.parse({**values, "schedule": {"peak": number}})
    with pytest.raises(ConfigError, match=r"objectives\.0\.options\.size"):
        Recipe.parse({**values, "objectives": [{"name": "contrastive", "options": {"size": number}}]})
