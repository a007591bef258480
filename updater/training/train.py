"""Training of one update: pinned data, recipe and seed in, an adapter directory out. The same in, the same out.

>>> result = train(base, load_recipe("default"), pools, None, seed=0, budget=limits, out_dir=a, work_dir=b)
>>> result.adapter
'clip-0123456789ab'

A killed run goes on from its last checkpoint in ``work_dir`` and ends in the same adapter.

The first batch is measured; from that follow the steps that the budget pays for, and the rows of each pool that these
visit. No other row is prepared, and each when the first step asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from updater.data.pools import Pools
from updater.recipes import Recipe
from updater.step.learner import Base
from updater.step.team import Team
from updater.training.linesearch import Scored, check_searchable
from updater.training.result import Estimate, Limits, TrainResult
from updater.training.run import Run
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

    Args:
        incumbent: adapter directory to start from; None starts from the base.
        carry_over: what the update that made the incumbent left for the next one, if its recipe left something.
        out_dir: the adapter is written to ``out_dir/<its name>``.
        work_dir: keeps checkpoints and measured costs of this update.
        scored: scores merged adapters, for recipes whose merge searches its weight.
        stop: asked between steps; True ends in a checkpoint and :class:`Stopped`.
        duty_cycle: asked between steps for the share of ``limits.duty_cycle`` that may be used just now.
        workers: processes that take the steps in place of this one.

    Raises:
        TrainingError: the loss is not finite, or nothing is new; nothing is written.
        ConfigError: the recipe is of another family than the base, or searches its merge's weight without ``scored``;
            or ``limits.work_bytes`` does not hold the rows of one step.
        BudgetError: the budget does not pay for one step with its own rows.
        DiskFull: there is no room for what is computed once per sample; what was done is kept.
        Stopped: see ``stop``.
    """
    check_searchable(recipe, scored)
    given: dict[str, Any] = {"seed": seed, "limits": limits, "work_dir": work_dir, "carry_over": carry_over}
    begun = partial(
        Run, base, recipe, pools, incumbent, **given, out_dir=out_dir, stop=stop, duty_cycle=duty_cycle, device=device
    )
    with _reproducible(limits.threads):
        if workers is not None:
            with begun() as run:
                run.plan_steps()  # measures a step, which is kept in the work folder
            del run  # its model must not stay in memory while the workers have theirs
            workers.run(partial(take_steps, base, recipe, pools, incumbent, **given), work_dir, stop, duty_cycle)
        with begun() as run:
            return run.train(scored)


def take_steps(
    base: Base, recipe: Recipe, pools: Pools, incumbent: Path | None, team: Team, control: Control, *, seed: int,
    limits: Limits, work_dir: Path, carry_over: Path | None,
) -> None:  # fmt: skip
    """What each process of a team does of :func:`train`, after its caller has measured a step: take all steps. What
    they come to is in the checkpoint.

    Raises: what :func:`train` does.
    """
    with _reproducible(limits.threads), Run(
        base, recipe, pools, incumbent, seed=seed, limits=limits, work_dir=work_dir, carry_over=carry_over,
        stop=control.stop, duty_cycle=control.duty_cycle, team=team, report=control.report,
    ) as run:  # fmt: skip
        run.take_steps()


def estimate(
    base: Base, recipe: Recipe, pools: Pools, *, seed: int, limits: Limits, work_dir: Path, device: str | None = None
) -> Estimate:
    """What :func:`train` would come to from the base: one batch is measured and one step taken, which is thrown away.

    What is prepared for it stays in ``work_dir``; training with the same arguments uses it.

    Raises: what :func:`train` does before its first step.
    """
    with (
        _reproducible(limits.threads),
        Run(base, recipe, pools, None, seed=seed, limits=limits, work_dir=work_dir, device=device) as run,
    ):
        return run.estimate()


@contextmanager
def _reproducible(threads: int) -> Iterator[None]:
    """A fixed number of threads and deterministic algorithms; both change the order in which numbers are added."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
