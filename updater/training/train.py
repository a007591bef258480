"""Trains one update, deterministically: pinned data, recipe and seed in, an adapter directory out. A killed run resumes
from its last checkpoint in ``work_dir`` and yields the same adapter. See :class:`updater.training.trainer.Trainer` for
the loop, :mod:`updater.training.plan` for the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from core.errors import ConfigError
from updater.data.pools import Pools
from updater.methods.merging import Scored
from updater.recipes import Recipe
from updater.step.learner import Base
from updater.step.passes import Team
from updater.training.result import Estimate, Limits, TrainResult
from updater.training.trainer import Hooks, Job, Trainer
from updater.training.workers import Control, Workers


def train(
    base: Base,
    recipe: Recipe,
    pools: Pools,
    incumbent: Path | None,
    *,
    seed: int,
    limits: Limits,
    out_dir: Path,
    work_dir: Path,
    carry_over: Path | None = None,
    scored: Scored | None = None,
    stop: Callable[[], bool] = lambda: False,
    duty_cycle: Callable[[], float] = lambda: 1.0,
    device: str | None = None,
    workers: Workers | None = None,
) -> TrainResult:
    """Train one update.

    ``incumbent``: adapter directory to start from; None starts from the base. ``carry_over``: state from the update
    that made it, if any. ``out_dir``: the adapter is written to ``out_dir/<its name>``. ``work_dir``: keeps checkpoints
    and measured costs of this update. ``scored``: scores merged adapters, for recipes that search the merge weight.
    ``stop``: checked between steps; True ends in a checkpoint and :class:`Stopped`. ``duty_cycle``: polled between
    steps for the share of ``limits.duty_cycle`` that may currently be used. ``workers``: processes that take the steps
    instead of this one.

    Raises:
        TrainingError: the loss is not finite, or nothing is new; nothing is written.
        ConfigError: the recipe is of another family than the base, or searches its merge weight without ``scored``; or
            ``limits.work_bytes`` cannot hold the rows of one step.
        BudgetError: the budget does not pay for one step with its rows.
        DiskFull: there is no room for what is computed once per sample; completed work is kept.
        Stopped: see ``stop``.
    """
    if recipe.merge.search and scored is None:
        raise ConfigError(
            f"recipe {recipe.name!r}: merge.search wants suites to score on, and there are none here.",
            "Run it through the updater, or leave merge.search out: merge.weight is then used as it is.",
        )
    job = Job(base, recipe, pools, incumbent, seed, limits, work_dir, carry_over, device)
    hooks = Hooks(stop, duty_cycle)
    with _reproducible(limits.threads):
        if workers is not None:
            with Trainer(job, hooks) as trainer:
                trainer.plan()  # measures a step, which is kept in the work folder
            del trainer  # its model must not stay in memory while the workers have theirs
            workers.run(partial(take_steps, job), work_dir, stop, duty_cycle)
        with Trainer(job, hooks) as trainer:
            return trainer.train(out_dir, scored)


def take_steps(job: Job, team: Team, control: Control) -> None:
    """Take all steps, in each process of a team, after the caller has measured a step. The result is in the checkpoint.
    Raises what :func:`train` raises."""
    hooks = Hooks(control.stop, control.duty_cycle, control.report)
    with _reproducible(job.limits.threads), Trainer(replace(job, device=None), hooks, team) as trainer:
        trainer.take_steps()


def estimate(base: Base, recipe: Recipe, pools: Pools, *, seed: int, limits: Limits, work_dir: Path) -> Estimate:
    """Estimate :func:`train` from the base: one batch is measured and one step taken and discarded. Its preparation
    stays in ``work_dir``, for training with the same arguments. Raises what :func:`train` raises before its first step.
    """
    job = Job(base, recipe, pools, None, seed, limits, work_dir)
    with _reproducible(limits.threads), Trainer(job) as trainer:
        return trainer.estimate()


@contextmanager
def _reproducible(threads: int) -> Iterator[None]:
    """Fix the number of threads and use deterministic algorithms; both affect the order of additions."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
