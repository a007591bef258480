"""Trains an update: the budget, the trainer, and the ledger's row."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from core import metrics
from core.artifacts import Artifacts, directory_digest
from core.errors import BudgetError
from core.ledger import Ledger, UpdateRow
from core.progress import progress_log
from core.recorded_adapters import fetch_recorded
from core.settings import Settings
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from serving.engines.heads import read_heads
from streams.store.sample_store import SampleStore
from updater.budget.throttle import Throttle
from updater.families import spaces_of
from updater.gate.suite_items import Seal
from updater.heads import learn_heads, with_heads
from updater.recipes import Recipe
from updater.service import triggers
from updater.service.gate_update import TuningScores
from updater.service.learning_state import export_budget
from updater.service.process import StopSignal
from updater.service.update_pools import pools_of
from updater.step.learner import Base
from updater.training.result import Limits, TrainResult, cost_of
from updater.training.train import train
from updater.training.workers import Workers


class BucketEmpty(BudgetError):
    """Another update has spent the budget of this one; it waits until the bucket is full enough."""


def train_update(
    settings: Settings,
    ledger: Ledger,
    artifacts: Artifacts,
    store: SampleStore,
    base: Base,
    update: UpdateRow,
    work: Path,
    *,
    throttle: Throttle,
    stop: StopSignal,
    ended: Callable[[], bool] = lambda: False,
) -> UpdateRow:
    """Train an update and record its adapter. Idempotent: it resumes from its checkpoint, and is charged once.
    ``base``: to train; for an upgrade, the new one. ``work``: folder of checkpoints, measured costs, and the adapter
    until it is in the artifacts. ``ended``: true once an operator has ended the update; checked between steps. Raises
    BucketEmpty: the update waits for its budget; Stopped: asked to stop, or ended; otherwise it resumes from its
    checkpoint next time; RatchetError: it cannot be trained."""
    rate, capacity = triggers.bucket(settings)
    upgrade = ledger.base_upgrade(update.id)
    planned = upgrade.gflops if upgrade else triggers.planned_gflops(settings)
    charged = upgrade is None  # an upgrade has a budget of its own
    if charged and not ledger.charge(update.id, planned, now=time.time(), rate=rate, capacity=capacity):
        raise BucketEmpty(
            f"{update.id}: the bucket does not hold {planned:,.0f} MAF-GFLOPs any more.", "It is tried again later."
        )
    export_budget(settings, ledger)
    recipe = Recipe.parse(update.recipe, f"recipe of {update.id}")
    learned = update.data_to if upgrade else None
    pools = pools_of(settings, store, update, recipe, upgrade)
    limits = Limits(
        gflops=planned,
        seconds=math.inf if upgrade else settings.budget.seconds_per_update,
        threads=settings.updater.threads,
        duty_cycle=settings.updater.duty_cycle,
        checkpoint_steps=settings.updater.checkpoint_steps,
        work_bytes=settings.updater.work_gib * 2**30,
    )
    begins_at = None if upgrade else update.incumbent  # no adapter fits another base
    incumbent = fetch_recorded(artifacts, ledger, begins_at) if begins_at else None
    scored = None
    if recipe.merge.search:
        seal = Seal.of(settings, store, ledger.audited_data(update.family))
        scored = TuningScores.of(settings, store, base, update, seal, learned)
    memory = f"memories/{begins_at}"  # left by the update of the incumbent, if its recipe remembers something
    carry_over = artifacts.fetch(memory) if begins_at and artifacts.exists(memory) else None
    throttle.begin()
    with stop.training():
        result = train(
            base,
            recipe,
            pools,
            incumbent,
            seed=update.seed,
            limits=limits,
            out_dir=work / "adapter",
            work_dir=work,
            carry_over=carry_over,
            scored=scored,
            stop=lambda: stop() or ended(),
            duty_cycle=throttle,
            workers=Workers.of(settings),
        )
    result = _with_heads(settings, store, update, base, result, work)
    heads = sorted(read_heads(result.directory))
    meta = {"update": update.id, "recipe": recipe.name, "rank": recipe.rank, "heads": heads}
    ledger.register_adapter(  # first: from then on the collector leaves its files alone
        result.adapter,
        recipe.family,
        base.digest,
        *spaces_of(base, result.directory),
        meta,
        digest=directory_digest(result.directory),
    )
    artifacts.put_directory(result.directory, f"adapters/{result.adapter}")
    if result.carry_over is not None:
        artifacts.put_directory(result.carry_over, f"memories/{result.adapter}")
    if charged:
        ledger.settle(update.id, result.maf, capacity=capacity)
    metrics.update.trained(recipe.family, result.seconds, result.maf)
    metrics.update.visited(recipe.family, result.visited, result.pending - result.visited)
    metrics.update.left_out(recipe.family, len(result.left_out))
    stopped = "budget" if result.budget_spent else "time" if result.truncated else ""
    progress_log.info(
        f"{update.id}: trained {result.adapter}, {result.steps} steps in {result.seconds:.0f} s"
        + (f" (stopped at step {result.steps} of {result.planned_steps}: {stopped})" if stopped else "")
        + f", {result.visited} of {result.pending} pending samples visited"
    )
    for name, why in sorted(result.left_out.items()):
        progress_log.info(f"{update.id}: sample {name} is left out: {why}")
    cost = {**cost_of(result), "draw": settings.updater.draw}
    return ledger.advance_update(update.id, "trained", adapter=result.adapter, cost=cost)


def _with_heads(
    settings: Settings, store: SampleStore, update: UpdateRow, base: Base, result: TrainResult, work: Path
) -> TrainResult:
    wanted = settings.updater.heads
    if not wanted or not isinstance(base, ClipBase):
        return result
    engine = ClipEngine.of(settings, base, threads=settings.updater.threads)
    needed = 2 * settings.gate.min_items
    heads = learn_heads(engine, result.directory, store, update.store_version, wanted, needed)
    if not heads:
        return result
    directory = with_heads(engine, result.directory, heads, work / "adapter")
    return replace(result, adapter=directory.name, directory=directory)
