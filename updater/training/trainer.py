"""The training loop of one update, from top to bottom: train, take the steps, one step, its loss and gradients."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from core import metrics
from core.digests import digest_json
from core.errors import TrainingError
from core.progress import progress_log, track
from updater.adapters import LoraModel, WeightDelta, read_delta
from updater.adapters.weight_deltas import kept_share
from updater.budget.bound import BudgetSpent, Costs
from updater.budget.cost import Spending
from updater.budget.flops import counted
from updater.data.pools import Pools
from updater.families import make_learner
from updater.methods.merging import Scored, Searched, merged, remembered, search
from updater.methods.optimizers import learning_rate
from updater.recipes import PARTS, Merge, Recipe
from updater.step.learner import Base
from updater.step.passes import ALONE, Team, training_precision
from updater.training.checkpoint import CarryOver, Progress, load_checkpoint, run_precision, save_checkpoint
from updater.training.plan import Planner, TrainingPlan, Visits, nothing_usable
from updater.training.result import Estimate, Limits, TrainResult
from updater.training.workers import Stopped


@dataclass(frozen=True)
class Job:
    """An update to train: everything that, with the machine's precision, decides what is computed."""

    base: Base
    recipe: Recipe
    pools: Pools
    incumbent: Path | None
    seed: int
    limits: Limits
    work_dir: Path
    carry_over: Path | None = None
    device: str | None = None


@dataclass(frozen=True)
class Hooks:
    stop: Callable[[], bool] = lambda: False
    duty_cycle: Callable[[], float] = lambda: 1.0
    report: Callable[[str], None] = lambda line: None


NO_HOOKS: Final = Hooks()


class Trainer:
    """Trains one update; as a context manager, it stops the learner's reading ahead."""

    def __init__(self, job: Job, hooks: Hooks = NO_HOOKS, team: Team = ALONE) -> None:
        place = job.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.job, self.hooks, self.team, self.limits = job, hooks, team, job.limits
        self.served: WeightDelta = read_delta(job.incumbent, job.base) if job.incumbent else {}
        self.received = CarryOver.read(job.carry_over) if job.carry_over else CarryOver()
        name = job.incumbent.name if job.incumbent else None
        run = digest_json([job.base.digest, job.recipe.digest, job.pools.digest, job.seed, name, self.received.digest])
        own = training_precision(job.recipe, job.base, torch.device(place))
        precision = run_precision(job.work_dir, run, own)
        self.run = digest_json([run, precision])
        """Identifies everything that decides what the update computes."""
        self.recipe = job.recipe.model_copy(update={"precision": precision})
        starts = {"served": self.served, "trained": self.received.start or self.served, "base": {}}
        self.start: WeightDelta = starts[self.recipe.merge.start]
        self.learner = make_learner(job.base, self.recipe, self.start, job.seed, place)
        self.learner.remember(self.received.terms)
        self.planner = Planner(self.learner, self.recipe, job.pools, job.seed, self.limits, job.work_dir)
        self.progress: Progress | None = None
        self.began = self.slept = time.monotonic()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *error: object) -> None:
        self.learner.close()

    def train(self, out_dir: Path, scored: Scored | None) -> TrainResult:
        learner = self.learner
        # Share of the incumbent's ΔW that the recipe's rank can hold.
        kept = kept_share(self.served, self.recipe.rank) if isinstance(learner.model, LoraModel) else 1.0
        if kept < 1:
            progress_log.info(
                f"the incumbent's rank is above the {self.recipe.rank} of recipe {self.recipe.name!r}, which holds"
                f" {100 * kept:.1f}% of what it learned (of the squared norm of its ΔW)"
            )
        plan, visits, progress = self.take_steps()
        unusable = learner.shards.left_out
        left_out = {
            visits.pools.examples[row].id: unusable[row] for row in visits.seen(progress.step) if row in unusable
        }
        if not progress.losses:
            raise nothing_usable(left_out)
        if learner.average is not None:
            learner.average.apply(learner.parameters)
        trained = learner.model.delta()
        for name, part in trained.items():
            if not all(bool(torch.isfinite(tensor).all()) for tensor in part.tensors()):
                raise TrainingError(
                    f"after step {progress.step} the adapter of {name} is not finite; nothing was written.",
                    "Lower schedule.peak in the recipe.",
                )

        def gradients(number: int) -> None:
            if rows := learner.usable(visits.rows(number % progress.step)):
                learner.forward_backward(rows, regularized=False)

        with counted() as closing:
            for _, regularizer in learner.regularizers:
                regularizer.finish(learner.parameters, gradients)
        cost, prepared = plan.cost, max(learner.prepared_gflops(), progress.prepared)
        spent = math.fsum([prepared, *progress.gflops, progress.broken_off, closing.gflops])
        directory, searched, carry_over = self._write(trained, out_dir, scored)
        costs = {
            **cost.to_json(),
            "prepare_gflops": prepared,
            "broken_off_gflops": progress.broken_off,
            "memory_ratio": cost.memory_ratio,
            "maf_per_step": cost.maf_per_step,
            "precision": learner.precision,
            "incumbent_kept": kept,
        }
        return TrainResult(
            adapter=directory.name,
            directory=directory,
            steps=progress.step,
            planned_steps=plan.steps,
            maf=cost.adjusted(spent),
            maf_planned=cost.planned(plan.steps, visits.batches),
            seconds=progress.seconds,
            truncated=progress.truncated,
            budget_spent=progress.budget_spent,
            losses=progress.losses,
            cost=costs | searched.to_json(cost.sample_gflops),
            samples=visits.pools.sizes,
            pending=len(self.job.pools.new),
            visited=visits.new_samples(progress.step, self.recipe.views.count),
            left_out=left_out,
            carry_over=carry_over,
        )

    def take_steps(self) -> tuple[TrainingPlan, Visits, Progress]:
        """Plan the steps and their rows, and take all steps from the last checkpoint on."""
        plan = self.plan()
        visits = self.planner.visits(plan.steps)
        progress = self._resume(plan, visits)
        if progress.truncated or progress.budget_spent:  # it had ended before it was killed
            return plan, visits, progress
        self.progress = progress
        cost, earlier = plan.cost, progress.seconds
        losses = {name: list(values) for name, values in progress.losses.items()}
        spending = Spending(
            self.limits.gflops, cost, progress.gflops, Costs(progress.known or cost.known, progress.excess),
            self.learner.prepared_gflops, alone=self.team.size == 1, repeats=not self.learner.answers_itself,
        )  # fmt: skip
        self.learner.afford = spending.afford
        for step in track(range(progress.step, progress.steps), f"training ({self.recipe.name})"):
            try:
                values = self.train_step(step, progress.steps, visits.rows(step), spending)
            except BudgetSpent as spent:
                if step == 0:
                    needed = cost.adjusted(spent.needed)
                    raise cost.unaffordable(self.limits.gflops, visits.batches, needed) from spent
                progress_log.info(
                    f"training stops at step {step} of {progress.steps}: the next one would exceed the budget"
                )
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
                progress_log.info(
                    f"training stops after {seconds:.0f} s at step {step + 1} of {progress.steps} (wall-clock bound)"
                )
                self._save(progress)
                break
            if (step + 1) % self.limits.checkpoint_steps == 0 or step + 1 == progress.steps:
                self._save(progress)
            self._between()
        self.progress = None  # the next attempt repeats what follows
        return plan, visits, progress

    def train_step(self, step: int, steps: int, rows: list[int], spending: Spending) -> dict[str, float]:
        """Learn from a batch, except rows that cannot be prepared. Returns the loss and each term; nothing if no row is
        left. Raises BudgetSpent."""
        self.learner.ready(rows)
        rows = self.learner.usable(rows)
        if not rows:
            spending.skipped()
            return {}
        loss, terms = self.forward_backward(step, rows, spending)
        rate = learning_rate(self.recipe.schedule, step, steps, not self.start, self.received.updates)
        self.learner.optimizer_step(rate, step, steps)
        if self.team.rank == 0:
            metrics.update.stepped(self.recipe.family, {"loss": loss, **terms})
            self.hooks.report(f"step {step + 1} of {steps}, loss {loss:.3f}")
        return {"loss": loss, **terms}

    def forward_backward(self, step: int, rows: list[int], spending: Spending) -> tuple[float, dict[str, float]]:
        """Compute loss and gradients of ready rows within the budget: see
        :meth:`updater.step.learner.Learner.forward_backward`. Raises BudgetSpent: they would exceed it; TrainingError:
        the loss is not finite."""
        size = self.learner.size(rows)
        with counted(spending.afford_step(size)) as flops:
            loss, terms = self.learner.forward_backward(rows)
        spending.stepped(size, self.team.total(flops.gflops))
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss of step {step} is {loss}: recipe {self.recipe.name!r} diverged.",
                "Lower schedule.peak in the recipe, or look for broken samples in the newest data.",
            )
        return loss, terms

    def plan(self) -> TrainingPlan:
        return self.planner.plan(self.run, self._between)

    def estimate(self) -> Estimate:
        """Plan the steps, and take one whose rows are not prepared yet."""
        plan = self.plan()
        pools, cost = plan.measured.pools, plan.cost
        self.learner.prepare(pools.examples, pools.parts, plan.precomputed, self._between)
        rows = plan.measured.rows(1)
        began = time.monotonic()
        self.learner.ready(rows)
        prepared = time.monotonic()
        self.learner.forward_backward(rows)
        stepped = time.monotonic()
        visited = sum(plan.whole.visited(part, plan.steps) for part in PARTS)
        return Estimate(
            steps=plan.steps,
            gflops=cost.planned(plan.steps, plan.whole),
            seconds=(prepared - began) * visited / len(rows) + (stepped - prepared) * plan.steps,
            visited=plan.whole.visited("new", plan.steps),
            sample_gflops=cost.sample_gflops,
        )

    def _resume(self, plan: TrainingPlan, visits: Visits) -> Progress:
        self.learner.join(self.team)
        run = digest_json([plan.run, visits.pools.digest])
        # Processes make different shards: none of them may stop by itself.
        between = self._between if self.team.size == 1 else lambda: None
        self.learner.prepare(visits.pools.examples, visits.pools.parts, plan.precomputed, between)
        checkpoint = self.team.agree(load_checkpoint(self.job.work_dir, run))
        progress = Progress(run, 0, plan.steps, 0.0)
        if checkpoint is not None and checkpoint[1].steps == plan.steps:
            self.learner.load_state(checkpoint[0])
            progress = checkpoint[1]
            progress_log.info(f"training goes on at step {progress.step} of {plan.steps}")
            unknown = progress.step - len(progress.gflops)  # those of an older version
            progress = replace(progress, gflops=[plan.cost.step_gflops] * unknown + progress.gflops)
        self.learner.ready(visits.seen(progress.step))  # all are there; those of an earlier attempt are counted, too
        return progress

    def _write(self, trained: WeightDelta, out_dir: Path, scored: Scored | None) -> tuple[Path, Searched, Path | None]:
        """Merge the trained delta with the served one. Returns the adapter's directory, the result of a search for the
        merge weight, and the carry-over's directory."""
        rule = self.recipe.merge
        memory = remembered(rule, self.served, trained, self.start, self.received.merge)
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".candidate-", dir=out_dir) as staging:

            def write(merge: Merge, place: Path) -> str:
                return self.learner.model.write(merged(merge, self.served, trained, self.start, memory), place)

            searched = search(rule, scored, write, Path(staging), self._between)
            name = write(searched.merge, Path(staging) / "adapter")
            directory = out_dir / name
            if not directory.exists():
                (Path(staging) / "adapter").rename(directory)
        carry_over = CarryOver(
            start=trained if rule.start == "trained" else {},
            terms=self.learner.remembered(),
            updates=self.received.updates + 1 if self.recipe.schedule.updates != "constant" else 0,
            merge=memory,
        )
        return directory, searched, carry_over.write(out_dir / f"{name}.memory")

    def _between(self) -> None:
        """Between steps and shards: stop if asked to, and sleep for the rest of the duty cycle."""
        stop, share = self.team.agree((self.hooks.stop(), self.limits.duty_cycle * self.hooks.duty_cycle()))
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
            save_checkpoint(self.job.work_dir, self.learner.state(), progress)
