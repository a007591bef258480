"""The rate and the weight of each method: the same number of trials for all, on pairs that no table reports.

``tuned.json`` in this folder holds the trials by recipe. A recipe runs with the factors of its best trial, by the
geometric mean; the default, which must not forget, with those of its best trial without a significant loss. A recipe
without trials runs unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.continual.protocol import STANDARDS
from updater.recipes import Recipe, load_recipe

Factors = tuple[float, float]
AS_IT_IS: Factors = (1.0, 1.0)
BOTH: tuple[Factors, ...] = (AS_IT_IS, (0.3, 1.0), (3.0, 1.0), (1.0, 0.3), (1.0, 3.0))
RATES: tuple[Factors, ...] = (AS_IT_IS, (0.3, 1.0), (3.0, 1.0), (0.1, 1.0), (10.0, 1.0))
"""For a recipe with one term, which has no weight to choose."""
FILE = Path(__file__).with_name("tuned.json")
UPDATES = 5
"""Updates of the stream that each trial learns."""
ORDER = 11
"""A random order that no table reports."""


class Trial(NamedTuple):
    """Factors, and their results on the tuning suites, in points."""

    rate: float
    weight: float
    gm: float
    a_zs: float
    a_zs_high: float
    """Upper end of its 95% interval: the loss is significant if it is negative."""

    @property
    def factors(self) -> Factors:
        return self.rate, self.weight


def trials(recipe: Recipe) -> tuple[Factors, ...]:
    return BOTH if len(recipe.objectives) + len(recipe.regularizers) > 1 else RATES


def recipe_of(method: str, trial: int | None = None) -> Recipe:
    recipe = load_recipe(method)
    if trial is not None:
        return scaled(recipe, trials(recipe)[trial])
    best = chosen_trial(method)
    return scaled(recipe, best.factors) if best else recipe


def scaled(recipe: Recipe, factors: Factors) -> Recipe:
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


def chosen_trial(method: str) -> Trial | None:
    """The trial that a recipe runs with; None if it has none."""
    return choose(method, tried().get(method, ()))


def choose(method: str, candidates: Sequence[Trial]) -> Trial | None:
    if method in STANDARDS:
        candidates = [trial for trial in candidates if trial.a_zs_high >= 0] or candidates
    return max(candidates, key=lambda trial: trial.gm, default=None)


def plain_trials(methods: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [trial._asdict() | {"chosen": trial is chosen_trial(name)} for trial in tried()[name]]
        for name in methods
        if name in tried()
    }


@cache
def tried() -> Mapping[str, tuple[Trial, ...]]:
    if not FILE.is_file():
        return {}
    return {name: tuple(Trial(*row) for row in rows) for name, rows in json.loads(FILE.read_text()).items()}
