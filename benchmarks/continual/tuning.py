"""The rate and a second factor of each method: the same number of trials for all, on a stream of other pairs.

A trial is a place on a grid, whose first coordinate is a factor on the learning rates, and whose second one is a factor
on the weights of all terms after the first, or, for a recipe with one term that merges, on the odds of the trained
delta's weight. The search starts at the recipe as it is, and tries the neighbours of the best place so far, so an edge
moves as long as the best place lies on it. ``tuned.json`` in this folder holds the trials. A recipe runs with its best
trial by the geometric mean; the default, which must not forget, with its best trial without a significant loss. A
recipe without trials runs unchanged, and a variant with the factors of its recipe.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.continual.protocol import STANDARDS
from benchmarks.continual.variants import recipe_named
from updater.recipes import Recipe

Place = tuple[int, int]
"""Powers of about the square root of 10, of the rate's factor and of the second one."""
AS_IT_IS: Place = (0, 0)
TRIALS = 8
FILE = Path(__file__).with_name("tuned.json")
UPDATES = 3
"""Updates of the tuning stream that each trial learns."""
ORDER = 11
"""A random order that no table reports."""


class Trial(NamedTuple):
    """A place, and its results on the tuning suites, in points."""

    rate: int
    second: int
    gm: float
    a_zs: float
    a_zs_high: float
    """Upper end of its 95% interval: the loss is significant if it is negative."""

    @property
    def place(self) -> Place:
        return self.rate, self.second


def factor(power: int) -> float:
    """1, 3, 10, 30, ... and 0.3, 0.1, ..."""
    tens, half = divmod(power, 2)
    return float(f"{3 if half else 1}e{tens}")


def has_second(recipe: Recipe) -> bool:
    """True if there is another knob than the rate: a weighted term, or the weight of a merge."""
    return len(recipe.objectives) + len(recipe.regularizers) > 1 or recipe.merge.rule != "none"


def next_place(recipe: Recipe, done: Sequence[Trial]) -> Place | None:
    """The place to try next; None after :data:`TRIALS`."""
    if len(done) >= TRIALS:
        return None
    tried_places = {trial.place for trial in done}
    ranked = sorted(done, key=lambda trial: -trial.gm)
    for centre in [AS_IT_IS, *(trial.place for trial in ranked)]:
        for place in (centre, *_neighbours(centre, has_second(recipe))):
            if place not in tried_places:
                return place
    return None


def is_inside(recipe: Recipe, done: Sequence[Trial]) -> bool:
    """True if all neighbours of the best place were tried."""
    best = max(done, key=lambda trial: trial.gm)
    return set(_neighbours(best.place, has_second(recipe))) <= {trial.place for trial in done}


def _neighbours(place: Place, both: bool) -> list[Place]:
    rate, second = place
    return [(rate - 1, second), (rate + 1, second), *([(rate, second - 1), (rate, second + 1)] if both else [])]


def recipe_of(method: str, place: Place | None = None) -> Recipe:
    """The recipe of a method or variant at a place, by default that of its chosen trial."""
    plain = method.partition(".")[0]
    best = chosen_trial(plain)
    return scaled(recipe_named(method), place or (best.place if best else AS_IT_IS))


def scaled(recipe: Recipe, place: Place) -> Recipe:
    if place == AS_IT_IS:
        return recipe
    rate, second = map(factor, place)
    schedule, (first, *others) = recipe.schedule, recipe.objectives
    update: dict[str, Any] = {
        "schedule": schedule.model_copy(
            update={name: rate * getattr(schedule, name) for name in ("peak", "constant", "final")}
        )
    }
    if others or recipe.regularizers:
        update["objectives"] = (
            first, *(term.model_copy(update={"weight": second * term.weight}) for term in others)
        )  # fmt: skip
        update["regularizers"] = tuple(
            term.model_copy(update={"weight": second * term.weight}) for term in recipe.regularizers
        )
    elif recipe.merge.rule != "none":
        odds = second * recipe.merge.weight / max(1 - recipe.merge.weight, 1e-9)
        update["merge"] = recipe.merge.model_copy(update={"weight": odds / (1 + odds)})
    return recipe.model_copy(update=update)


def chosen_trial(method: str) -> Trial | None:
    """The trial that a recipe runs with; None if it has none."""
    return choose(method, tried().get(method, ()))


def choose(method: str, candidates: Sequence[Trial]) -> Trial | None:
    if method in STANDARDS:
        candidates = [trial for trial in candidates if trial.a_zs_high >= 0] or candidates
    return max(candidates, key=lambda trial: trial.gm, default=None)


def plain_trials(methods: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """Trials of methods, as factors."""
    return {
        name: [
            {
                **trial._asdict(), "rate": factor(trial.rate), "second": factor(trial.second),
                "chosen": trial is chosen_trial(name),
            }
            for trial in tried()[name]
        ]
        for name in methods
        if name in tried()
    }  # fmt: skip


@cache
def tried() -> Mapping[str, tuple[Trial, ...]]:
    if not FILE.is_file():
        return {}
    return {name: tuple(Trial(*row) for row in rows) for name, rows in json.loads(FILE.read_text()).items()}
