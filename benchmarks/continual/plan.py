"""A recipe at the benchmark's sizes: one batch size, one budget, and a schedule fitted to the affordable steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import Protocol as Interface

import numpy as np

from benchmarks.continual.protocol import Protocol
from core.digests import digest12, digest_json
from updater.budget.cost import Cost
from updater.data.draw import draw_key, reservoir_order
from updater.data.mixture import BatchPlan, plan_batches
from updater.data.pools import Example, Pools
from updater.families import make_learner
from updater.recipes import Recipe, Schedule, Term
from updater.step.learner import Base
from updater.training.checkpoint import read_json, write_json
from updater.training.measure import measure

PHASES = ("warmup_steps", "cooldown_steps", "anneal_steps")
COUNTED = ("average_every",)
"""Optional fields of a recipe that are also counted in steps."""
PASSES = "batches"
"""The option of a regularizer that is counted in steps: EWC's passes after the last one."""


class Lessons(Interface):
    """Training data of a chain."""

    @property
    def updates(self) -> Mapping[str, Sequence[Example]]:
        pass

    @property
    def reference(self) -> Sequence[Example]:
        """Pairs of the base's own domains."""


def draw(lessons: Lessons, order: list[str], number: int, recipe: Recipe, protocol: Protocol, seed: int) -> Pools:
    """The pools of an update: its pairs, the base's, and a reservoir over those of earlier updates.

    Shares that the recipe sets to 0 are empty, as in production. Replay is balanced over captions. All are in a random
    order, as a draw from the sample store is.
    """
    earlier = [pair for name in order[:number] for pair in lessons.updates[name]]
    candidates = list(earlier) if recipe.mixture.replay > 0 else []
    keys = np.fromiter((draw_key(pair.id, seed) for pair in candidates), np.uint64, len(candidates))
    concepts = [pair.text.lower() for pair in candidates]
    drawn = reservoir_order(keys, concepts, protocol.replay, recipe.replay_half_life, recipe.replay_balanced)
    replayed = {candidates[place].id for place in drawn}
    return Pools(
        new=lessons.updates[order[number]],
        reference=lessons.reference if recipe.mixture.reference > 0 else (),
        replay=tuple(pair for pair in earlier if pair.id in replayed),
    ).shuffled(seed)


@dataclass(frozen=True)
class ExperimentPlan:
    """``recipe`` at the benchmark's sizes; ``steps``: about as many as an update's budget pays for."""

    recipe: Recipe
    steps: int


def plan(base: Base, recipe: Recipe, lessons: Lessons, protocol: Protocol, folder: Path) -> ExperimentPlan:
    """Measure one step, or use a stored measurement, and fit the recipe to it.

    The phases of a schedule are counted in steps, for an update of ``max_steps``; they keep their shares of the steps
    that the budget pays for. Raises BudgetError when it pays for none.
    """
    sized, cost, batches = _sized_cost(base, recipe, lessons, protocol, folder)
    steps = cost.steps_within(protocol.gflops, protocol.max_steps, batches)
    factor = steps / recipe.max_steps
    counted = {name: _scaled(getattr(recipe, name), factor) for name in COUNTED if hasattr(recipe, name)}
    terms = tuple(_sized(term, factor) for term in recipe.regularizers)
    fitted = {"schedule": _fitted(recipe.schedule, factor), "regularizers": terms, **counted}
    return ExperimentPlan(sized.model_copy(update=fitted), steps)


def budget_of(base: Base, recipe: Recipe, steps: int, lessons: Lessons, protocol: Protocol, folder: Path) -> float:
    """Memory-adjusted GFLOPs of an update of this many steps. Arguments as in :func:`plan`."""
    _, cost, batches = _sized_cost(base, recipe, lessons, protocol, folder)
    return cost.planned(steps, batches)


def _sized_cost(
    base: Base, recipe: Recipe, lessons: Lessons, protocol: Protocol, folder: Path
) -> tuple[Recipe, Cost, BatchPlan]:
    """The recipe at the benchmark's batch size, the cost of its steps, and what its batches hold."""
    sized = recipe.model_copy(update={"batch_size": protocol.batch_size, "max_steps": protocol.max_steps})
    path = folder / f"{digest12(digest_json([base.digest, sized.digest]))}.json"
    measured = read_json(path)
    if not isinstance(measured, dict) or "sizes" not in measured:
        measured = _measured(base, sized, lessons, protocol)
        write_json(path, measured)
    batches = plan_batches(recipe.mixture, protocol.batch_size, measured["sizes"], seed=0)
    return sized, Cost(**measured["cost"] | {"closing": 0}), batches


def _measured(base: Base, recipe: Recipe, lessons: Lessons, protocol: Protocol) -> dict[str, Any]:
    """Cost of a step and of preparing the rows of the last update, which has the fullest pools, and their sizes."""
    order = list(lessons.updates)
    pools = draw(lessons, order, len(order) - 1, recipe, protocol, seed=0)
    rows = pools.rows(plan_batches(recipe.mixture, recipe.batch_size, pools.sizes, seed=0).batch(0))
    learner, examples = make_learner(base, recipe, {}, 0), pools.examples
    learner.prepare(examples, pools.parts)
    cost = measure(learner, [examples[row] for row in rows], [rows])
    return {"recipe": recipe.name, "cost": cost.to_json(), "sizes": pools.sizes}


def _fitted(schedule: Schedule, factor: float) -> Schedule:
    return schedule.model_copy(update={name: _scaled(getattr(schedule, name), factor) for name in PHASES})


def _sized(term: Term, factor: float) -> Term:
    if PASSES not in term.options:
        return term
    options = {**term.options, PASSES: _scaled(int(term.options[PASSES]), factor)}
    return term.model_copy(update={"options": options})


def _scaled(steps: int, factor: float) -> int:
    """At least one, unless it is 0."""
    return max(min(steps, 1), round(steps * factor))
