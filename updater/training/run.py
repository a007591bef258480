"""The course of one update: what its budget pays for, the rows that it visits, its steps, and what they leave."""

from __future__ import annotations

import math
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from core import metrics
from core.digests import digest_json
from core.errors import ConfigError, TrainingError
from core.progress import say, track
from updater.adapters import LoraModel, WeightDelta, read_delta
from updater.adapters.weight_deltas import kept_share
from updater.budget.bound import BudgetSpent
from updater.budget.cost import Cost
from updater.budget.flops import counted
from updater.data.mixture import PARTS, BatchPlan, plan_batches
from updater.data.pools import Example, Pools, run_starts, visits
from updater.families import make_learner
from updater.methods.merging import merged, remembered
from updater.recipes import Merge, Part, Recipe
from updater.step.learner import AnyLearner, Base, Work
from updater.step.precision import training_precision
from updater.step.team import ALONE, ONE_FILE_SYSTEM, Team
from updater.training.checkpoint import Progress, load_checkpoint, read_json, run_precision, save_checkpoint, write_json
from updater.training.linesearch import Scored, search
from updater.training.measure import measure
from updater.training.result import CarryOver, Estimate, Limits, TrainResult
from updater.training.schedules import learning_rate
from updater.training.spending import Spending
from updater.training.workers import Stopped

PREPARED = "prepared"
"""Folder of shards, in an update's work folder."""
MEASURED = 100
"""Batches whose mean length a step's cost follows from."""


class Run:
    """The course of one call of :func:`train`, in a ``with`` statement: it ends what the learner reads in advance."""

    def __init__(
        self, base: Base, recipe: Recipe, pools: Pools, incumbent: Path | None, *, seed: int, limits: Limits,
        work_dir: Path, out_dir: Path | None = None, carry_over: Path | None = None,
        stop: Callable[[], bool] = lambda: False, duty_cycle: Callable[[], float] = lambda: 1.0,
        device: str | None = None, team: Team = ALONE, report: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        """Arguments as of :func:`train`; ``report`` is called after each step."""
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        served: WeightDelta = read_delta(incumbent, base) if incumbent else {}
        received = CarryOver.read(carry_over) if carry_over else CarryOver()
        name = incumbent.name if incumbent else None
        run = digest_json([base.digest, recipe.digest, pools.digest, seed, name, received.digest])
        precision = run_precision(work_dir, run, training_precision(recipe, base, torch.device(place)))
        self.run = digest_json([run, precision])
        """Names everything that decides what the run computes."""
        self.recipe = recipe.model_copy(update={"precision": precision})
        self.served, self.source, self.seed, self.limits = served, pools, seed, limits
        self.out_dir, self.work_dir = out_dir or work_dir, work_dir
        self.stop, self.duty_cycle, self.team, self.report = stop, duty_cycle, team, report
        starts = {"served": served, "trained": received.start or served, "base": {}}
        self.start: WeightDelta = starts[recipe.merge.start]
        self.learner: AnyLearner = make_learner(base, self.recipe, self.start, seed, place)
        self.kept = kept_share(served, recipe.rank) if isinstance(self.learner.model, LoraModel) else 1.0
        """Of what the incumbent learned, the share that the recipe's rank holds."""
        self.learner.remember(received.terms)
        self.updates, self.merge_memory = received.updates, received.merge
        self.progress: Progress | None = None
        self.began = time.monotonic()
        self.slept = self.began

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.learner.close()

    def train(self, scored: Scored | None) -> TrainResult:
        """Measure, plan the steps and the rows that they visit, step, and write the adapter."""
        learner = self.learner
        cost, steps, progress = self.take_steps()
        if not progress.losses:
            raise self._nothing_usable(self._left_out(progress.step))
        learner.settle()
        trained = learner.model.delta()
        _refuse_non_finite(trained, progress.step)
        with counted() as closing:
            for _, regularizer in learner.regularizers:
                regularizer.finish(learner.parameters, lambda number: self._gradients(number % progress.step))
        prepared = max(learner.prepared_gflops(), progress.prepared)
        spent = math.fsum([prepared, *progress.gflops, progress.broken_off, closing.gflops])
        memory = remembered(self.recipe.merge, self.served, trained, self.start, self.merge_memory)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".candidate-", dir=self.out_dir) as staging:

            def write(merge: Merge, place: Path) -> str:
                return learner.model.write(merged(merge, self.served, trained, self.start, memory), place)

            weighed = search(self.recipe.merge, scored, write, Path(staging), self._between)
            name = write(weighed.merge, Path(staging) / "adapter")
            directory = self.out_dir / name
            if not directory.exists():
                (Path(staging) / "adapter").rename(directory)
        carry_over = CarryOver(
            start=trained if self.recipe.merge.start == "trained" else {},
            terms=learner.remembered(),
            updates=self.updates + 1 if self.recipe.schedule.updates != "constant" else 0,
            merge=memory,
        )
        costs = {
            **cost.to_json(),
            "prepare_gflops": prepared,
            "broken_off_gflops": progress.broken_off,
            "memory_ratio": cost.memory_ratio,
            "maf_per_step": cost.maf_per_step,
            "precision": self.learner.precision,
            "incumbent_kept": self.kept,
        }
        return TrainResult(
            adapter=name,
            directory=directory,
            steps=progress.step,
            planned_steps=steps,
            maf=cost.adjusted(spent),
            maf_planned=cost.planned(steps, self.plan),
            seconds=progress.seconds,
            truncated=progress.truncated,
            budget_spent=progress.budget_spent,
            losses=progress.losses,
            cost=costs | weighed.to_json(cost.sample_gflops),
            samples=self.pools.sizes,
            pending=len(self.source.new),
            visited=self._seen(progress.step),
            left_out=self._left_out(progress.step),
            carry_over=carry_over.write(self.out_dir / f"{name}.memory"),
        )

    def take_steps(self) -> tuple[Cost, int, Progress]:
        """Measure, plan the steps and the rows that they visit, and go on from the last checkpoint to the last step."""
        cost, steps = self.plan_steps()
        self.learner.join(self.team)
        self.pools, self.plan = self._drawn(steps)
        self.run = digest_json([self.run, self.pools.digest])
        # Processes make different shards: none of them may stop by itself.
        between = self._between if self.team.size == 1 else lambda: None
        self.learner.prepare(self.pools.examples, self.pools.parts, self.work, between)
        checkpoint = self.team.agree(load_checkpoint(self.work_dir, self.run))
        progress = Progress(self.run, 0, steps, 0.0)
        if checkpoint is not None and checkpoint[1].steps == steps:
            self.learner.load_state(checkpoint[0])
            progress = checkpoint[1]
            say(f"training goes on at step {progress.step} of {steps}")
            unknown = progress.step - len(progress.gflops)  # those of an older version
            progress = replace(progress, gflops=[cost.step_gflops] * unknown + progress.gflops)
        self.learner.ready(self._visited(progress.step))  # all are there; those of an earlier attempt are counted, too
        return cost, steps, self._steps(progress, cost)

    def _steps(self, progress: Progress, cost: Cost) -> Progress:
        if progress.truncated or progress.budget_spent:  # that had ended it before it was killed
            return progress
        self.progress = progress
        earlier = progress.seconds
        losses = {name: list(values) for name, values in progress.losses.items()}
        spending = Spending(self.limits.gflops, cost, progress, self.learner)
        self.learner.afford = spending.afford
        for step in track(range(progress.step, progress.steps), f"training ({self.recipe.name})"):
            try:
                values = self._step(step, progress.steps, spending)
            except BudgetSpent as spent:
                if step == 0:
                    raise cost.unaffordable(self.limits.gflops, self.plan, cost.adjusted(spent.needed)) from spent
                say(f"training stops at step {step} of {progress.steps}: the next one would exceed the budget")
                self.learner.model.restore()
                prepared = self.learner.prepared_gflops()
                progress = replace(progress, budget_spent=True, prepared=prepared, broken_off=spent.broken_off)
                self._save(progress)
                break
            for name, value in values.items():
                losses.setdefault(name, []).append(value)
            seconds = earlier + time.monotonic() - self.began
            late = self.team.agree(seconds > self.limits.seconds and step + 1 < progress.steps)
            progress = replace(
                progress, step=step + 1, seconds=seconds, losses=losses, truncated=late, gflops=spending.steps,
                known=spending.costs.to_json(), excess=spending.costs.excess,
            )  # fmt: skip
            self.progress = progress
            if late:
                say(f"training stops after {seconds:.0f} s at step {step + 1} of {progress.steps} (wall-clock bound)")
                self._save(progress)
                break
            if (step + 1) % self.limits.checkpoint_steps == 0 or step + 1 == progress.steps:
                self._save(progress)
            self._between()
        self.progress = None  # what follows is done again by the next attempt
        return progress

    def _step(self, step: int, steps: int, spending: Spending) -> dict[str, float]:
        """Learn from a batch, without what cannot be prepared. Returns the loss and each term; nothing where no row is
        left. Raises BudgetSpent.
        """
        rows = self._rows(step)
        self.learner.ready(rows)
        rows = self.learner.usable(rows)
        if not rows:
            spending.skipped()
            return {}
        size = self.learner.size(rows)
        with counted(spending.afford_step(size)) as flops:
            loss, terms = self.learner.backward(rows)
        spending.stepped(size, self.team.total(flops.gflops))
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss of step {step} is {loss}: recipe {self.recipe.name!r} diverged.",
                "Lower schedule.peak in the recipe, or look for broken samples in the newest data.",
            )
        rate = learning_rate(self.recipe.schedule, step, steps, not self.start, self.updates)
        self.learner.update(rate, step, steps)
        if self.team.rank == 0:
            metrics.update.stepped(self.recipe.family, {"loss": loss, **terms})
            self.report(f"step {step + 1} of {steps}, loss {loss:.3f}")
        return {"loss": loss, **terms}

    def _between(self) -> None:
        """Between steps and shards: end if asked to, and sleep for the share of time that is others'."""
        stop, share = self.team.agree((self.stop(), self.limits.duty_cycle * self.duty_cycle()))
        if stop:
            if self.progress is not None:
                self._save(self.progress)
            raise Stopped
        worked = time.monotonic() - self.slept
        if share < 1:
            time.sleep(worked * (1 / share - 1))
        self.slept = time.monotonic()

    def _save(self, progress: Progress) -> None:
        if self.team.rank == 0:
            save_checkpoint(self.work_dir, self.learner.state(), progress)

    def plan_steps(self) -> tuple[Cost, int]:
        """What a step costs, and how many the budget pays for."""
        cost = self._cost()
        return cost, cost.steps_within(self.limits.gflops, self._most_steps(cost), self._whole_plan())

    def _cost(self) -> Cost:
        """Measured once: a resumed update must plan the same number of steps."""
        self.pools, self.plan = self._drawn(min(self.recipe.max_steps, MEASURED))
        self.run = digest_json([self.run, self.pools.digest, self.source.sizes])
        self.work = Work(
            folder=self.work_dir / PREPARED,
            key=self.run,
            rows={str(part): count for part, count in self.plan.counts.items()},
            room=self.limits.work_bytes / sum(self._whole_plan().visited(p, self.recipe.max_steps) for p in PARTS),
            threads=self.limits.threads,
        )
        path = self.work_dir / "cost.json"
        saved = read_json(path)
        if isinstance(saved, dict) and saved.get("run") == self.run:
            with suppress(TypeError, KeyError):  # an older version kept other fields
                return Cost(**{"known": saved["cost"]["known"], **saved["cost"]})
        if self.team.size > 1:
            raise ConfigError(
                f"{path} has not what a step costs, which the updater has measured.",
                ONE_FILE_SYSTEM,
            )
        examples = self.pools.examples
        self.learner.prepare(examples, self.pools.parts, self.work, self._between)
        batches = [self._rows(step) for step in range(min(self.recipe.max_steps, MEASURED))]
        rows = self._usable(batches)
        cost = measure(self.learner, [examples[row] for row in rows], [rows, *batches[1:]])
        write_json(path, {"run": self.run, "cost": cost.to_json()})
        if self.kept < 1:
            say(
                f"the incumbent's rank is above the {self.recipe.rank} of recipe {self.recipe.name!r}, which holds"
                f" {100 * self.kept:.1f}% of what it learned (of the squared norm of its ΔW)"
            )
        say(f"a step: {cost.step_gflops:.1f} GFLOPs at {cost.memory_ratio:.2f} of full fine-tuning's memory")
        return cost

    def _usable(self, batches: Sequence[list[int]]) -> list[int]:
        """What can be prepared of the first batch of which something new can. Raises TrainingError."""
        for batch in batches:
            self.learner.ready(batch)
            if rows := self.learner.usable(batch):
                return rows
        examples, left_out = self.pools.examples, self.learner.shards.left_out
        new = sorted(row for row in left_out if self.learner.parts[row] == "new")
        raise self._nothing_usable({examples[row].id: left_out[row] for row in new})

    def _drawn(self, steps: int) -> tuple[Pools, BatchPlan]:
        """What so many steps visit of each pool, of what the model can learn from, and the batches of these steps.

        Raises TrainingError when nothing new is left.
        """
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
        return pools, BatchPlan(counts, pools.sizes, self.seed, runs)

    def _whole_plan(self) -> BatchPlan:
        """The batches as if the model could learn from all of what was drawn, in every view."""
        views = self.recipe.views.count
        return BatchPlan(self.plan.counts, {part: n * views for part, n in self.source.sizes.items()}, self.seed)

    def _most_steps(self, cost: Cost) -> int:
        """As many as the recipe wants, and as the disk may hold the rows of. Raises ConfigError where that is none."""
        plan, rows = self._whole_plan(), int(self.limits.work_bytes / max(cost.row_bytes, 1.0))

        def visited(steps: int) -> int:
            return sum(plan.visited(part, steps) for part in PARTS)

        if visited(1) > rows:
            raise ConfigError(
                f"updater.work_gib does not hold what one step computes once: {visited(1)} samples of"
                f" {cost.row_bytes / 1e6:,.2f} MB.",
                "Raise it, or use a recipe with a smaller batch.",
            )
        return bisect_right(range(1, self.recipe.max_steps + 1), rows, key=visited)

    def estimate(self) -> Estimate:
        """Measure, plan the steps, and take one of them, whose rows no other has."""
        cost, steps = self.plan_steps()
        plan = self._whole_plan()
        self.learner.prepare(self.pools.examples, self.pools.parts, self.work, self._between)
        rows = self._rows(1)
        began = time.monotonic()
        self.learner.ready(rows)
        prepared = time.monotonic()
        self.learner.backward(rows)
        stepped = time.monotonic()
        visited = sum(plan.visited(part, steps) for part in PARTS)
        return Estimate(
            steps=steps,
            gflops=cost.planned(steps, plan),
            seconds=(prepared - began) * visited / len(rows) + (stepped - prepared) * steps,
            visited=plan.visited("new", steps),
            sample_gflops=cost.sample_gflops,
        )

    def _rows(self, step: int) -> list[int]:
        return self.pools.rows(self.plan.batch(step))

    def _visited(self, steps: int) -> list[int]:
        """The rows that so many steps see."""
        return self.pools.rows([(p, row) for p in self.plan.counts for row in range(self.plan.visited(p, steps))])

    def _seen(self, steps: int) -> int:
        """New samples that so many steps see, in whatever view."""
        seen = self.pools.new[: self.plan.visited("new", steps)]
        return len(seen) if self.recipe.views.count == 1 else len({each.id for each in seen})

    def _left_out(self, steps: int) -> dict[str, str]:
        """Reasons by id, of the examples that so many steps came to and could not use."""
        left_out = self.learner.shards.left_out
        return {self.pools.examples[row].id: left_out[row] for row in self._visited(steps) if row in left_out}

    def _nothing_usable(self, left_out: Mapping[str, str]) -> TrainingError:
        name, why = next(iter(left_out.items()))
        return TrainingError(
            f"of {len(left_out)} samples none can be prepared; {name}: {why}.",
            "Look at what is published on the stream, and whether the base's processor takes such pictures.",
        )

    def _gradients(self, step: int) -> None:
        if rows := self.learner.usable(self._rows(step)):
            self.learner.backward(rows, regularized=False)


def _refuse_non_finite(delta: WeightDelta, step: int) -> None:
    for name, part in delta.items():
        if not all(bool(torch.isfinite(tensor).all()) for tensor in part.tensors()):
            raise TrainingError(
                f"after step {step} the adapter of {name} is not finite; nothing was written.",
                "Lower schedule.peak in the recipe.",
            )
