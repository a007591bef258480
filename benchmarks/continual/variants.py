"""Recipes that are made of others, by name: ``zscl.framed`` is ZSCL in the default's frame, ``default.unmerged`` the
default without its merge, ``wise-ft.25`` another point of WiSE-FT's curve, ``two-teachers.stages`` MulKI's
stages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from updater.recipes import Merge, Mixture, Recipe, load_recipe

FRAMED: Final = "framed"
STANDARD: Final = "default"
DISTILLATION: Final = "feature_distillation"
ALPHAS: Final = (10, 25, 75, 90)
"""Weights of the trained delta on WiSE-FT's curve, in hundredths; the recipe itself has 50."""


def recipe_named(name: str) -> Recipe:
    """A recipe, or a variant of one. Raises ConfigError when there is no such recipe."""
    plain, _, kind = name.partition(".")
    if not kind:
        return load_recipe(name)
    if kind == FRAMED:
        return framed(load_recipe(plain))
    changes = VARIANTS[name](load_recipe(plain))
    return load_recipe(plain).model_copy(update={"name": name, **changes})


def framed(recipe: Recipe) -> Recipe:
    """The recipe with the default's mixture of pools and its merge; a recipe that merges itself keeps its rule."""
    default = load_recipe(STANDARD)
    merge = default.merge if recipe.merge.rule == "none" else recipe.merge
    update = {"name": f"{recipe.name}.{FRAMED}", "mixture": default.mixture, "merge": merge}
    return recipe.model_copy(update=update)


def has_frame(name: str) -> bool:
    """True unless the recipe has the default's mixture and a merge already: framed, it would be the same."""
    recipe = load_recipe(name)
    return framed(recipe).model_copy(update={"name": name}) != recipe


def _mixture(reference: float, new: float, replay: float) -> Callable[[Recipe], dict[str, Any]]:
    return lambda recipe: {"mixture": Mixture(reference=reference, new=new, replay=replay)}


def _undistilled(recipe: Recipe) -> dict[str, Any]:
    return {"objectives": tuple(term for term in recipe.objectives if term.name != DISTILLATION)}


def _merge_weight(percent: int) -> Callable[[Recipe], dict[str, Any]]:
    return lambda recipe: {"merge": recipe.merge.model_copy(update={"weight": percent / 100})}


ABLATIONS: Final[Mapping[str, Callable[[Recipe], dict[str, Any]]]] = {
    f"{STANDARD}.undistilled": _undistilled,
    f"{STANDARD}.without-replay": _mixture(0.25, 0.75, 0.0),
    f"{STANDARD}.without-reference": _mixture(0.0, 0.75, 0.25),
    f"{STANDARD}.unmerged": lambda recipe: {"merge": Merge(rule="none")},
    f"{STANDARD}.new-alone": _mixture(0.0, 1.0, 0.0),
    f"{STANDARD}.thirds": _mixture(0.33, 0.34, 0.33),
}
"""The default without one of its parts; ``new-alone``: without both pools; ``thirds``: at FoMo-in-Flux's mixture."""
CURVE: Final[Mapping[str, Callable[[Recipe], dict[str, Any]]]] = {
    f"wise-ft.{percent}": _merge_weight(percent) for percent in ALPHAS
}
STAGES: Final[Mapping[str, Callable[[Recipe], dict[str, Any]]]] = {
    "two-teachers.stages": lambda recipe: {
        "objectives": tuple(
            term.model_copy(update={"options": {"align": 1.0}}) if term.name == "two_teacher_relations" else term
            for term in recipe.objectives
        ),
        "average_every": 10,
        "merge": Merge(rule="linear", weight=0.5),
    }
}
"""Two teachers with the other stages that MulKI's abstract names: sides aligned by prototypes before, and models of the
update and of updates connected after, by the mean of the parameters along the steps and with what is served.
"""
VARIANTS: Final = {**ABLATIONS, **CURVE, **STAGES}
