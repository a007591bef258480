"""The updater: waits for data and budget, trains, gates, proposes. Every step can be repeated after a kill.

training   charged once (by the update's id); trains from its last checkpoint; writes the adapter, then the ledger
trained    the adapter is in the artifacts and in the ledger; the gate judges it
gated      the verdict and its report are stored; what passed is proposed
done       or failed, with the reason
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops import metrics
from ops.artifacts import Artifacts
from ops.digests import digest12, digest_json
from ops.errors import BudgetError, ConfigError, GateError, LedgerError, RatchetError, StoreError, TrainingError
from ops.ledger import Ledger, UpdateRow
from ops.progress import say
from ops.settings import Settings
from serving.engines.adapters import effective_weights
from serving.engines.base import ClipBase, load_base
from streams.store import SampleStore
from updater import triggers
from updater.base import reference_folders
from updater.judge import judge
from updater.pools import draw_pools, mixed_seed
from updater.process import StopSignal, be_nice, only_one, use_environment
from updater.recipes import Recipe, load_recipe
from updater.train import Limits, Stopped, TrainResult, train
from updater.triggers import FAMILY, Ready, Waiting

QUIET_SECONDS = 60.0
"""How often the reason for waiting is repeated when it stays the same."""


@dataclass(frozen=True)
class Outcome:
    """What one call of :meth:`UpdaterService.step` did: nothing (``update`` is None), or one whole update."""

    update: UpdateRow | None
    reason: str


class UpdaterService:
    """The updater's state machine; all state is in the ledger and in ``home/updates/<id>``."""

    def __init__(
        self,
        settings: Settings,
        recipe: Recipe | None = None,
        *,
        stop: StopSignal | None = None,
    ) -> None:
        self.settings = settings
        self.recipe = recipe or load_recipe(settings.updater.recipe)
        self.ledger = Ledger.open(settings.ledger)
        self.artifacts = Artifacts(settings.artifacts)
        self.store = SampleStore(settings.lake)
        self.base: ClipBase = load_base(settings.home, settings.base.clip)
        self.stop = stop or StopSignal()

    def step(self, *, now: bool = False, retry: bool = False) -> Outcome:
        """Finish the update that a killed trainer left, or begin one if it is time to. See :func:`triggers.decide`.

        Raises:
            RatchetError: storage, base or suites cannot be used; the update stays where it is and is taken up again.
            Stopped: asked to stop in training; the update goes on from its checkpoint next time.
        """
        found = self.ledger.unfinished_update(FAMILY)
        if found is not None:
            say(f"{found.id} goes on ({found.state})")
            if found.state == "training" and self._data_is_gone(found):
                return Outcome(self._abandon(found), "its data is not kept any more")
        else:
            ready = triggers.decide(self.settings, self.ledger, self.store, self.recipe, now=now, retry=retry)
            if isinstance(ready, Waiting):
                return Outcome(None, ready.reason)
            found = self._begin(ready)
        done = self._finish(found)
        return Outcome(done, done.error or done.state)

    def run_forever(self) -> None:
        """Poll the triggers until asked to stop. Errors of storage or suites are reported and tried again."""
        said, at = "", 0.0
        while not self.stop():
            try:
                outcome = self.step()
                reason = outcome.reason
                wait = 0.0 if outcome.update else self.settings.updater.poll_seconds
            except RatchetError as error:
                reason, wait = str(error), max(30.0, self.settings.updater.poll_seconds)
            rate, capacity = triggers.bucket(self.settings)
            metrics.update.budget(self.ledger.bucket_level(time.time(), rate, capacity))
            if wait and (reason != said or time.monotonic() - at > QUIET_SECONDS):
                say(f"updater waits: {reason}")
                said, at = reason, time.monotonic()
            time.sleep(wait)

    def _begin(self, ready: Ready) -> UpdateRow:
        recipe = self.recipe.model_dump(mode="json")
        seed = mixed_seed(self.settings.updater.seed, ready.store_version)
        what = [recipe, seed, ready.store_version, ready.data_from, ready.incumbent, ready.previous]
        update = self.ledger.begin_update(
            f"update-{digest12(digest_json(what))}",
            family=FAMILY,
            recipe=recipe,
            seed=seed,
            store_version=ready.store_version,
            data_from=ready.data_from,
            data_to=ready.data_to,
            incumbent=ready.incumbent,
        )
        say(f"{update.id} begins: {ready.new_samples} new samples, recipe {self.recipe.name}")
        return update

    def _finish(self, update: UpdateRow) -> UpdateRow:
        """Take an update from where it is to its end."""
        work = self.work_dir(update)
        metrics.update.running(FAMILY, True)
        try:
            if update.state == "training":
                update = self._train(update, work)
            if update.state == "trained":
                update = judge(self.settings, self.ledger, self.artifacts, self.store, self.base, update)
            if update.state == "gated":
                update = self._propose(update)
        except (LedgerError, StoreError, GateError, ConfigError):
            raise  # storage that is away, or settings that are wrong, are no fault of the update: it waits
        except RatchetError as error:
            update = self._fail(update, error)
        finally:
            metrics.update.running(FAMILY, False)
        metrics.update.finished(FAMILY, update.state, float(update.cost.get("seconds", 0.0)))
        shutil.rmtree(work, ignore_errors=True)
        return update

    def _data_is_gone(self, update: UpdateRow) -> bool:
        """Whether the store has forgotten the version that an update was pinned to."""
        latest = self.store.version()  # raises when the store cannot be read at all
        try:
            self.store.count(version=update.store_version)
        except StoreError:
            return latest > update.store_version
        return False

    def _abandon(self, update: UpdateRow) -> UpdateRow:
        error = f"version {update.store_version} of the sample store is not kept any more"
        say(f"{update.id} is abandoned: {error}")
        return self.ledger.advance_update(update.id, "abandoned", error=error)

    def work_dir(self, update: UpdateRow) -> Path:
        """Checkpoints and measured costs of an unfinished update."""
        return self.settings.home / "updates" / update.id

    def _train(self, update: UpdateRow, work: Path) -> UpdateRow:
        settings = self.settings
        rate, capacity = triggers.bucket(settings)
        planned = triggers.planned_gflops(settings)
        if not self.ledger.charge(update.id, planned, now=time.time(), rate=rate, capacity=capacity):
            raise BudgetError(
                f"{update.id}: the bucket does not hold {planned:,.0f} MAF-GFLOPs any more.", "It is tried again later."
            )
        recipe = Recipe.parse(update.recipe, f"recipe of {update.id}")
        pools = draw_pools(
            self.store, recipe, reference_folders(settings), update.store_version, update.data_from, update.seed
        )
        if not pools.new:
            raise TrainingError(f"{update.id}: no new sample has a text.", "CLIP updates need captions.")
        limits = Limits(
            gflops=planned,
            seconds=settings.budget.seconds_per_update,
            threads=settings.updater.threads,
            duty_cycle=settings.updater.duty_cycle,
            checkpoint_steps=settings.updater.checkpoint_steps,
        )
        incumbent = self.artifacts.fetch(f"adapters/{update.incumbent}") if update.incumbent else None
        with self.stop.training():
            result = train(
                self.base,
                recipe,
                pools,
                incumbent,
                seed=update.seed,
                limits=limits,
                out_dir=work / "adapter",
                work_dir=work,
                stop=self.stop,
            )
        self.artifacts.put_directory(result.directory, f"adapters/{result.adapter}")
        self._register(update, recipe, result)
        self.ledger.settle(update.id, result.maf, capacity=capacity)
        metrics.update.spent("train", result.maf)
        say(f"{update.id}: trained {result.adapter}, {result.steps} steps in {result.seconds:.0f} s")
        return self.ledger.advance_update(update.id, "trained", adapter=result.adapter, cost=cost_of(result))

    def _register(self, update: UpdateRow, recipe: Recipe, result: TrainResult) -> None:
        spaces = self.base.spaces_with(effective_weights(result.directory, self.base.build_model()))
        self.ledger.register_adapter(
            result.adapter,
            FAMILY,
            self.base.digest,
            spaces.image,
            spaces.text,
            {"update": update.id, "recipe": recipe.name, "rank": recipe.rank},
        )

    def _propose(self, update: UpdateRow) -> UpdateRow:
        verdict = self.ledger.verdict_of(update.id)
        if verdict is not None and verdict.outcome == "passed":
            live = self.ledger.live()
            proposal = self.ledger.propose(
                "update",
                clip=update.adapter,
                vlm=live.vlm if live else None,
                actor="updater",
                reason=f"{update.id} passed the gate (recipe {update.recipe['name']})",
                update_id=update.id,
            )
            say(f"{update.id} passed and is proposal {proposal.id}")
        return self.ledger.advance_update(update.id, "done")

    def _fail(self, update: UpdateRow, error: RatchetError) -> UpdateRow:
        say(f"{update.id} failed: {error}")
        if isinstance(error, BudgetError) and self.ledger.spent(update.id):
            self.ledger.settle(update.id, 0.0, capacity=triggers.bucket(self.settings)[1])  # no step was taken
        return self.ledger.advance_update(update.id, "failed", error=str(error))


def cost_of(result: TrainResult) -> dict[str, Any]:
    """What the ledger and the report tell of a training run."""
    return {
        "gflops_planned": result.maf_planned,
        "gflops_spent": result.maf,
        "seconds": result.seconds,
        "steps": result.steps,
        "steps_planned": result.planned_steps,
        "truncated": result.truncated,
        "loss_first": result.losses["loss"][0],
        "loss_last": result.losses["loss"][-1],
        "samples": sum(result.samples.values()),
        **{f"samples_{part}": count for part, count in result.samples.items()},
        **result.cost,
    }


def run_update(
    settings: Settings, *, once: bool = False, recipe: str | None = None, retry: bool = False, reexec: bool = True
) -> Outcome | None:
    """``ratchet update``: the updater as a process of low priority, until SIGTERM; with ``once``, one update.

    Raises:
        TrainingError: with ``once``, when there is nothing to train, or the update failed.
    """
    if reexec:
        use_environment()
    be_nice(settings.updater.nice)
    stop = StopSignal()
    stop.install()
    with only_one(settings.home):
        service = UpdaterService(settings, load_recipe(recipe) if recipe else None, stop=stop)
        try:
            if not once:
                metrics.listen(settings.updater.metrics_port)
                service.run_forever()
                return None
            outcome = service.step(now=True, retry=retry)
        except Stopped:
            say("updater stops; the update goes on from its checkpoint next time")
            return None
    if outcome.update is None:
        raise TrainingError(f"no update was trained: {outcome.reason}.", "Publish new samples, or use --retry.")
    if outcome.update.state != "done":
        raise TrainingError(f"{outcome.update.id} {outcome.update.state}: {outcome.update.error}")
    return outcome
