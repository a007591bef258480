"""Plans an update: the cost of a step, the number of steps that the budget pays for, and the rows that they visit. The
first batch is measured; the number of steps follows from it, and from that the rows of each pool. Rows are prepared
when a step first needs them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from core.digests import digest_json
from core.errors import ConfigError, TrainingError
from core.progress import progress_log
from updater.budget.cost import Cost
from updater.data.mixture import BatchPlan, plan_batches
from updater.data.pools import Example, Pools, run_starts, visits
from updater.recipes import PARTS, Part, Recipe
from updater.step.learner import AnyLearner, Precomputed
from updater.step.passes import ONE_FILE_SYSTEM
from updater.training.checkpoint import read_json, write_json
from updater.training.measure import measure
from updater.training.result import Limits

PREPARED = "prepared"
MEASURED = 100
"""Batches whose mean length is used for the cost of a step."""


@dataclass(frozen=True)
class Visits:
    pools: Pools
    batches: BatchPlan

    def rows(self, step: int) -> list[int]:
        return self.pools.rows(self.batches.batch(step))

    def seen(self, steps: int) -> list[int]:
        counts = self.batches.counts
        return self.pools.rows([(p, row) for p in counts for row in range(self.batches.visited(p, steps))])

    def new_samples(self, steps: int, views: int) -> int:
        """Distinct new samples that the first steps see, in any view."""
        seen = self.pools.new[: self.batches.visited("new", steps)]
        return len(seen) if views == 1 else len({each.id for each in seen})


@dataclass(frozen=True)
class TrainingPlan:
    run: str
    """Identifies everything that decides what is computed once per example."""
    cost: Cost
    steps: int
    precomputed: Precomputed
    measured: Visits
    whole: BatchPlan
    """The batches as if the model could learn from all drawn examples, in every view."""


@dataclass(frozen=True)
class Planner:
    learner: AnyLearner
    recipe: Recipe
    source: Pools
    seed: int
    limits: Limits
    work_dir: Path

    def plan(self, run: str, between: Callable[[], None]) -> TrainingPlan:
        """Measure a step, unless an earlier attempt did, and plan as many as the budget pays for. Raises TrainingError:
        there is nothing new, or none of it can be prepared; ConfigError: the work folder cannot hold the rows of one
        step; StepUnaffordable: the budget does not pay for one."""
        measured = self.visits(min(self.recipe.max_steps, MEASURED))
        counts = measured.batches.counts
        views = self.recipe.views.count
        whole = BatchPlan(counts, {part: n * views for part, n in self.source.sizes.items()}, self.seed)
        run = digest_json([run, measured.pools.digest, self.source.sizes])
        precomputed = Precomputed(
            folder=self.work_dir / PREPARED,
            key=run,
            rows={str(part): count for part, count in counts.items()},
            room=self.limits.work_bytes / sum(whole.visited(part, self.recipe.max_steps) for part in PARTS),
            threads=self.limits.threads,
        )
        cost = self._cost(run, measured, precomputed, between)
        steps = cost.steps_within(self.limits.gflops, self._most_steps(cost, whole), whole)
        return TrainingPlan(run, cost, steps, precomputed, measured, whole)

    def visits(self, steps: int) -> Visits:
        """Visits of ``steps`` to usable examples. Raises TrainingError if nothing new is left."""
        takes, mixture, size = self.learner.takes, self.recipe.mixture, self.recipe.batch_size
        some = {part: int(any(map(takes, self.source.of(part)))) for part in PARTS}
        if not some["new"]:
            raise TrainingError("there is no new sample to learn from.", "Look at what is published on the stream.")
        counts = plan_batches(mixture, size, some, self.seed).counts
        most = {part: counts.get(part, 0) * steps for part in PARTS}
        batches = self.recipe.batches

        def drawn(part: Part) -> tuple[Example, ...]:
            rows = tuple(islice(filter(takes, self.source.of(part)), most[part]))
            return visits(rows, most[part], self.recipe.views, batches, f"{self.seed} {part}")

        pools = Pools(*map(drawn, PARTS))
        runs: dict[Part, tuple[int, ...]] = {}
        if batches.domains == "grouped":
            runs = {part: run_starts([each.domain for each in pools.of(part)], batches.group) for part in PARTS}
        return Visits(pools, BatchPlan(counts, pools.sizes, self.seed, runs))

    def _cost(self, run: str, visits: Visits, precomputed: Precomputed, between: Callable[[], None]) -> Cost:
        path = self.work_dir / "cost.json"
        saved = read_json(path)
        if isinstance(saved, dict) and saved.get("run") == run:
            with suppress(TypeError, KeyError):  # an older version kept other fields
                return Cost(**{"known": saved["cost"]["known"], **saved["cost"]})
        if self.learner.team.size > 1:
            raise ConfigError(f"{path} has not what a step costs, which the updater has measured.", ONE_FILE_SYSTEM)
        examples = visits.pools.examples
        self.learner.prepare(examples, visits.pools.parts, precomputed, between)
        batches = [visits.rows(step) for step in range(min(self.recipe.max_steps, MEASURED))]
        rows = self._usable(batches, examples)
        cost = measure(self.learner, [examples[row] for row in rows], [rows, *batches[1:]])
        write_json(path, {"run": run, "cost": cost.to_json()})
        progress_log.info(
            f"a step: {cost.step_gflops:.1f} GFLOPs at {cost.memory_ratio:.2f} of full fine-tuning's memory"
        )
        return cost

    def _usable(self, batches: Sequence[list[int]], examples: Sequence[Example]) -> list[int]:
        """Usable rows of the first batch with a new one among them. Raises TrainingError."""
        for batch in batches:
            self.learner.ready(batch)
            if rows := self.learner.usable(batch):
                return rows
        left_out = self.learner.shards.left_out
        new = sorted(row for row in left_out if self.learner.parts[row] == "new")
        raise nothing_usable({examples[row].id: left_out[row] for row in new})

    def _most_steps(self, cost: Cost, whole: BatchPlan) -> int:
        """Limit by the recipe and by disk space. Raises ConfigError if there is no room for one step."""
        rows = int(self.limits.work_bytes / max(cost.row_bytes, 1.0))

        def visited(steps: int) -> int:
            return sum(whole.visited(part, steps) for part in PARTS)

        if visited(1) > rows:
            raise ConfigError(
                f"updater.work_gib does not hold what one step computes once: {visited(1)} samples of"
                f" {cost.row_bytes / 1e6:,.2f} MB.",
                "Raise it, or use a recipe with a smaller batch.",
            )
        return bisect_right(range(1, self.recipe.max_steps + 1), rows, key=visited)


def nothing_usable(left_out: Mapping[str, str]) -> TrainingError:
    name, why = next(iter(left_out.items()))
    return TrainingError(
        f"of {len(left_out)} samples none can be prepared; {name}: {why}.",
        "Look at what is published on the stream, and whether the base's processor takes such pictures.",
    )
