"""The rate and the weight of each method: the same number of trials for all, on pairs that no table reports.

``tuned.json`` beside this file holds the trials, by recipe: a factor on its learning rates, one on the weights of its
terms beside the first, and the geometric mean that they came to. A recipe runs with those of its best trial; one that
is not there runs as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from updater.recipes import Recipe, load_recipe

Factors = tuple[float, float]
"""On the rates, and on the weights."""
Trial = tuple[float, float, float]
"""Factors, and the geometric mean on the tuning suites, in points."""
AS_IT_IS: Factors = (1.0, 1.0)
BOTH: tuple[Factors, ...] = (AS_IT_IS, (0.3, 1.0), (3.0, 1.0), (1.0, 0.3), (1.0, 3.0))
RATES: tuple[Factors, ...] = (AS_IT_IS, (0.3, 1.0), (3.0, 1.0), (0.1, 1.0), (10.0, 1.0))
"""Of a recipe with one term: it has no weight to choose."""
FILE = Path(__file__).with_name("tuned.json")
UPDATES = 5
"""Of the stream, that each trial learns."""
ORDER = 11
"""A random one that no table reports."""


def trials(recipe: Recipe) -> tuple[Factors, ...]:
    """What is tried of a recipe."""
    return BOTH if len(recipe.objectives) + len(recipe.regularizers) > 1 else RATES


def recipe_of(method: str, trial: int | None = None) -> Recipe:
    """A recipe with the factors of a trial, or else with those that were chosen."""
    recipe = load_recipe(method)
    factors = chosen(method) if trial is None else trials(recipe)[trial]
    return scaled(recipe, factors)


def scaled(recipe: Recipe, factors: Factors) -> Recipe:
    """A recipe with other rates and weights."""
    if factors == AS_IT_IS:
        return recipe
    rate, weight = factors
    schedule = recipe.schedule
    first, *others = recipe.objectives
    return recipe.model_copy(
        update={
            "schedule": schedule.model_copy(
                update={name: rate * getattr(schedule, name) for name in ("peak", "constant", "final")}
            ),
            "objectives": (first, *(term.model_copy(update={"weight": weight * term.weight}) for term in others)),
            "regularizers": tuple(
                term.model_copy(update={"weight": weight * term.weight}) for term in recipe.regularizers
            ),
        }
    )


def chosen(method: str) -> Factors:
    """The factors of a recipe's best trial; as it is, where it has none."""
    rate, weight, _ = max(tried().get(method, ()), key=lambda trial: trial[2], default=(*AS_IT_IS, 0.0))
    return rate, weight


@cache
def tried() -> Mapping[str, tuple[Trial, ...]]:
    """Trials by recipe, of the file."""
    if not FILE.is_file():
        return {}
    return {name: tuple((r, w, gm) for r, w, gm in rows) for name, rows in json.loads(FILE.read_text()).items()}
