"""The updater: waits for data and budget, trains, gates, proposes. Every step can be repeated after a kill.

training   charged once; trains from its last checkpoint; writes adapter and carry-over, then the ledger
trained    the gate judges the adapter; imported adapters and candidates that are asked again begin here
gated      the verdict and its report are stored; an adapter that passed is proposed
done       or failed, with the reason
"""

from __future__ import annotations

import errno
import logging
import shutil
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import metrics
from core.artifacts import Artifacts
from core.dependencies import answered, noted
from core.digests import digest12, digest_json
from core.errors import (
    BaseModelError,
    ConfigError,
    DiskFull,
    GateError,
    LedgerError,
    RatchetError,
    StoreError,
    TrainingError,
)
from core.ledger import BaseUpgradeRow, Ledger, UpdateRow
from core.ledger.learning import BEGAN, FINISHED, TRIGGER
from core.progress import progress_log
from core.settings import Settings
from ratchet_client import Client
from serving.engines.clip_base import ClipBase, need_base, shown
from streams.store.sample_store import SampleStore
from updater.bases import families_with_a_base, need_reference
from updater.budget.cost import StepUnaffordable
from updater.budget.throttle import Throttle, latencies
from updater.data.draw import WITHOUT
from updater.data.pools import mixed_seed
from updater.families import family_base
from updater.recipes import Family, Recipe, family_recipe, load_recipe
from updater.service import triggers
from updater.service.gate_update import gate_update
from updater.service.learning_state import LedgerMetrics, check_suites, export_budget, learning_states
from updater.service.process import StopSignal, ThrottledLog, only_one, work_folders
from updater.service.release_audit import audit_release, due_audit
from updater.service.screening import screen
from updater.service.train_update import BucketEmpty, train_update
from updater.service.triggers import IMPORTED, Learned, Ready, Reevaluate, Waiting
from updater.step.learner import Base
from updater.training.checkpoint import NAME as CHECKPOINT
from updater.training.plan import PREPARED
from updater.training.workers import Stopped

log = logging.getLogger(__name__)
ATTEMPTS = 3
"""An update fails after this many errors outside Ratchet, or process deaths at one place."""
POLL_SECONDS = 5.0
RETRY_SECONDS = 30.0
LATENCY_RATIO = 1.25
"""The trainer backs off while a route takes this multiple of its earlier time: less is within the usual variation."""
LEAST_DUTY_CYCLE = 0.25
"""Minimum share of time while requests take longer: with less an update would take hours."""
ASK_SECONDS = 5.0


@dataclass(frozen=True)
class StepResult:
    update: UpdateRow | None
    reason: str


class UpdaterService:
    """The updater's state machine; all state is in the ledger and in ``home/updates/<id>``. It updates the CLIP and the
    VLM in turn, from one budget; with a recipe or a family, only that model."""

    def __init__(
        self,
        settings: Settings,
        recipe: Recipe | None = None,
        *,
        family: Family | None = None,
        stop: StopSignal | None = None,
    ) -> None:
        """Raises ConfigError if a recipe is of another family than wanted, BaseModelError without a base."""
        if recipe and family not in (None, recipe.family):
            raise ConfigError(
                f"recipe {recipe.name!r} trains a {recipe.family.upper()}, not a {str(family).upper()}.",
                "Leave the family out: the recipe decides.",
            )
        self.settings = settings
        only = recipe.family if recipe else family
        turns = (only,) if only else families_with_a_base(settings)
        self.turns: deque[Family] = deque(turns)
        """Families in the order of their turns; the current one moves to the end."""
        self.recipes: dict[Family, Recipe] = {each: recipe or family_recipe(settings, each) for each in turns}
        self.bases: dict[Family, Base] = {each: family_base(settings, each) for each in turns}
        self.ledger = Ledger.open(settings.ledger)
        self.artifacts = Artifacts(settings.artifacts)
        self.store = SampleStore(settings.lake)
        self.stop = stop or StopSignal()
        self._ledger_metrics = LedgerMetrics(self.ledger)
        self._asked = 0.0
        server = Client(
            settings.server, settings.operator_key().get_secret_value(), actor="updater", timeout=2.0, retries=0
        )
        self._throttle = Throttle(
            lambda: latencies(server), LATENCY_RATIO, min(1.0, LEAST_DUTY_CYCLE / settings.updater.duty_cycle)
        )

    def run_forever(self) -> None:
        """Poll the triggers until asked to stop. Errors of storage or suites are reported and retried."""
        for family in self.turns:
            metrics.update.now(family, "waiting")
        waiting_log = ThrottledLog()
        with suppress(RatchetError):  # of a store that is away, as below
            for family, state in learning_states(self.settings, self.ledger, self.store).items():
                if family in self.turns and state.lacks:
                    progress_log.info(f"nothing is trained for the {family.upper()}: {state.lacks}")
        while not self.stop():
            try:
                for folder in work_folders(self.settings.home):
                    if self.ledger.is_finished(folder.name):
                        shutil.rmtree(folder, ignore_errors=True)
                export_budget(self.settings, self.ledger)
                self._ledger_metrics.export(self.turns)
                self._throttle.watch()
                outcome = self.step()
                answered(["ledger", "store", "artifacts"])
                reason = outcome.reason
                wait = 0.0 if outcome.update else POLL_SECONDS
            except RatchetError as error:
                noted(error)
                reason, wait = str(error), RETRY_SECONDS
            if wait:
                waiting_log.say(reason)
            time.sleep(wait)

    def step(self, *, now: bool = False, retry: bool = False) -> StepResult:
        """Finish the update that a killed trainer left, or begin one if it is due, see :func:`triggers.decide`.
        Families are asked in turn, until one has something to do.

        Raises:
            RatchetError: storage, base or suites cannot be used; the update resumes after the other family's turn.
            TrainingError: a library's error; it is retried, and fails after :data:`ATTEMPTS`.
            Stopped: asked to stop in training; the update resumes from its checkpoint next time.
        """
        reasons = {}
        for _ in range(len(self.turns)):
            family = self.turns[0]
            self.turns.rotate(-1)
            outcome = self._step_of(family, now, retry)
            if outcome.update is not None:
                return outcome
            reasons[family] = outcome.reason
        if len(set(reasons.values())) == 1:
            return StepResult(None, next(iter(reasons.values())))
        return StepResult(None, "; ".join(f"{family.upper()}: {reasons[family]}" for family in sorted(reasons)))

    def _step_of(self, family: Family, now: bool, retry: bool) -> StepResult:
        update = self.ledger.unfinished_update(family)
        if update is not None:
            if update.state == "trained" and update.recipe.get("name") == IMPORTED:
                unreleased = triggers.waits_for_release(self.ledger, family)
                if unreleased is not None:
                    return StepResult(None, unreleased)
                learned = Learned.of(self.ledger, self.store, family)  # what is live now, and what it has not learned
                update = self.ledger.compare_update(
                    update.id,
                    store_version=learned.store_version,
                    data_from=learned.data_from,
                    incumbent=learned.incumbent,
                )
            if waits := self._waits_for_base(family, self.ledger.base_upgrade(update.id)):
                return StepResult(None, waits)
            if update.state == "training" and self._data_is_gone(update):
                return StepResult(self._abandon(update), "its data is not kept any more")
            progress_log.info(f"{update.id} goes on ({update.state})")
        else:
            if waits := self._waits_for_base(family):
                return StepResult(None, waits)
            if waits := self._audit(family):
                return StepResult(None, waits)
            recipe = self.recipes[family]
            ready = triggers.decide(self.settings, self.ledger, self.store, recipe, now=now, retry=retry)
            if isinstance(ready, Waiting):
                metrics.update.unjudged(family, False)
                return StepResult(None, ready.reason)
            if isinstance(ready, Ready) and (lacks := self._lacks(recipe, ready)):
                return StepResult(None, lacks)
            if isinstance(ready, Ready) and self._screen(family, ready.learned):
                return self._step_of(family, now, retry) if now else StepResult(None, "samples are held")
            update = self._reevaluate(ready) if isinstance(ready, Reevaluate) else self._begin(recipe, ready)
        # Again for one that goes on: the process that began it may have died before pinning, or it was abandoned.
        self.store.pin(update.id, update.store_version)
        done = self._finish(update, family)
        return StepResult(done, done.error or done.state)

    def _audit(self, family: Family) -> str:
        """Audit the live release if that is due. Returns why nothing is trained: it failed, and was not taken back."""
        due = due_audit(self.settings, self.ledger, self.bases[family], family)
        if due is not None:
            audit_release(self.settings, self.ledger, self.artifacts, self.store, self.bases[family], family, due)
        failed = self.ledger.failed_audit(family)
        metrics.gate.audited(family, failed is not None)
        if failed is None or self.ledger.held() is None:
            return ""
        return f"the audit of release {failed.release} failed: {failed.summary['reasons'][0]}; {failed.advice}"

    def _screen(self, family: Family, learned: Learned) -> int:
        """Hold new samples whose image and text do not agree. Returns how many: then the update is decided again."""
        base = self.bases[family]
        if not isinstance(base, ClipBase):
            return 0

        def stop() -> None:
            if self.stop():
                raise Stopped

        return screen(self.settings, self.ledger, self.artifacts, self.store, base, learned.incumbent, stop=stop)

    def _lacks(self, recipe: Recipe, ready: Ready) -> str:
        try:
            check_suites(self.settings, recipe.family, learned=bool(ready.learned.data_from))
            need_reference(self.settings, recipe)
        except (GateError, ConfigError) as error:
            metrics.update.unjudged(recipe.family, True)
            return str(error)
        metrics.update.unjudged(recipe.family, False)
        return ""

    def _waits_for_base(self, family: Family, upgrade: BaseUpgradeRow | None = None) -> str | None:
        """Reason to train nothing now. An upgrade needs both of its bases: one may be pulled again."""
        home = self.settings.home
        if upgrade is None:
            return waits_for_base(self.ledger, home, self.bases[family])
        try:
            need_base(home, upgrade.new_base, upgrade.new_name), need_base(home, upgrade.old_base, upgrade.old_name)
        except BaseModelError as error:
            return str(error)
        return None

    def _begin(self, recipe: Recipe, ready: Ready) -> UpdateRow:
        values, learned = recipe.model_dump(mode="json"), ready.learned
        seed = mixed_seed(0, learned.store_version)
        # Includes the newest update, so that a repeated attempt on the same data gets its own ID.
        previous = learned.updates[0].id if learned.updates else None
        what = [values, seed, learned.store_version, learned.data_from, learned.incumbent, previous]
        update = self.ledger.begin_update(
            f"update-{digest12(digest_json(what))}",
            family=recipe.family,
            recipe=values,
            seed=seed,
            store_version=learned.store_version,
            data_from=learned.data_from,
            data_to=ready.data_to,
            incumbent=learned.incumbent,
            cost={
                TRIGGER: ready.trigger,
                **({triggers.ONLY_LOOK: True} if ready.once else {}),
                **({WITHOUT: sorted(learned.without)} if learned.without else {}),
                **({triggers.BLAMED: ready.blamed} if ready.blamed else {}),
            },
        )
        counts = f"{ready.new_samples} new samples, {ready.fresh}"
        progress_log.info(f"{update.id} begins: {ready.trigger} ({counts}, recipe {recipe.name})")
        if ready.fresh.items < ready.fresh.needed:
            wanted = f"a gain of {100 * self.settings.gate.detect:.3g} points"
            then = "" if ready.once else ": then it asks again when more fresh items are there"
            progress_log.info(f"{update.id}: the gate may not be able to show {wanted}{then}")
        for deletion in self.ledger.list_deletions_in(update.id, update.store_version):
            progress_log.info(
                f"{update.id} is the first without {deletion.samples} samples of {deletion.id} ({deletion.reason})"
            )
        return update

    def _reevaluate(self, due: Reevaluate) -> UpdateRow:
        last = due.candidate.update
        update = self.ledger.begin_update(
            due.candidate.next_id,
            family=last.family,
            recipe=last.recipe,
            seed=last.seed,
            store_version=due.store_version,
            data_from=last.data_from,
            data_to=last.data_to,
            incumbent=last.incumbent,
            adapter=last.adapter,
            cost={**last.cost, triggers.TRAINED_BY: triggers.split_id(last.id)[0]},
        )
        progress_log.info(f"{update.id}: {update.adapter} is asked again, {due.fresh}")
        return update

    def _finish(self, update: UpdateRow, family: Family) -> UpdateRow:
        work, upgrade = self.work_dir(update), self.ledger.base_upgrade(update.id)
        try:
            self._count_death(update)
            base: Base = self.bases[family]
            if upgrade is not None:
                base = need_base(self.settings.home, upgrade.new_base, upgrade.new_name)
            if update.state == "training":
                metrics.update.now(family, "training")
                update = train_update(
                    self.settings, self.ledger, self.artifacts, self.store, base, update, work,
                    throttle=self._throttle, stop=self.stop, ended=lambda: self._is_ended(update.id),
                )  # fmt: skip
            if update.state == "trained":
                metrics.update.now(family, "judging")
                update = gate_update(self.settings, self.ledger, self.artifacts, self.store, base, update)
            if update.state == "gated":
                metrics.update.now(family, "proposing")
                update = self._propose(update, family)
        except (LedgerError, StoreError, GateError, ConfigError, DiskFull, BucketEmpty) as error:
            metrics.update.unjudged(family, isinstance(error, GateError))
            raise  # unavailable or full storage and wrong settings are not the update's fault: it waits
        except RatchetError as error:
            update = self._fail(update, family, error)
        except Stopped:
            if self.stop():
                raise
            update = self.ledger.update(update.id)
            if update.state not in FINISHED:
                return self._abandon(update)
            progress_log.info(f"{update.id} ends: {update.error}")
        except Exception as error:  # of a library or for memory: may be transient, so it is retried
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(f"{update.id} waits: {error}.", "Free space there; the update goes on then.") from error
            log.exception("%s: %s", update.id, error)
            update = self._attempted(update, family, error)
        finally:
            with suppress(LedgerError):
                self.ledger.advance_update(update.id, cost={BEGAN: None})
            metrics.update.now(family, "waiting")
        metrics.update.finished(family, update.state)
        shutil.rmtree(work, ignore_errors=True)
        self.store.unpin(update.id)
        return update

    def _propose(self, update: UpdateRow, family: Family) -> UpdateRow:
        verdict = self.ledger.verdict_of(update.id)
        for name, why in self.ledger.withdrawn([update.adapter]).items():
            progress_log.info(f"{update.id} made {name} again, which was withdrawn: {why}")
            return self.ledger.advance_update(update.id, "failed", error=f"{name} was withdrawn: {why}")
        if (upgrade := self.ledger.base_upgrade(update.id)) is not None:
            outcome = verdict.outcome if verdict else "not judged"
            passed = f"; release it with `ratchet base switch {upgrade.new_name}`" if outcome == "passed" else ""
            progress_log.info(f"{update.id} to the base {upgrade.new_name!r}: {outcome}{passed}")
        elif verdict is not None and verdict.outcome == "passed":
            proposal = self.ledger.propose(
                "update",
                family=family,
                clip=update.adapter if family == "clip" else None,
                vlm=update.adapter if family == "vlm" else None,
                actor="updater",
                reason=f"{update.id} passed the gate (recipe {update.recipe['name']})",
                update_id=update.id,
            )
            progress_log.info(f"{update.id} passed and is proposal {proposal.id}")
            if (source := update.cost.get(triggers.BLAMED)) is not None:
                self.ledger.distrust(
                    source, actor="updater", reason=f"{update.id} passes without it; {update.cost[TRIGGER]}",
                    update_id=update.id,
                )  # fmt: skip
        return self.ledger.advance_update(update.id, "done")

    def _fail(self, update: UpdateRow, family: Family, error: RatchetError) -> UpdateRow:
        progress_log.info(f"{update.id} failed: {error}")
        cost: dict[str, Any] = {}
        if isinstance(error, StepUnaffordable) and self.ledger.base_upgrade(update.id) is None:
            self.ledger.settle(update.id, 0.0, capacity=triggers.bucket(self.settings)[1])  # no step was taken
            cost = triggers.affordability(self.settings, family, error.needed)
        return self.ledger.advance_update(update.id, "failed", error=str(error), cost=cost)

    def _attempted(self, update: UpdateRow, family: Family, error: Exception) -> UpdateRow:
        """Count an error outside Ratchet. Raises TrainingError for a retry; the update fails after :data:`ATTEMPTS`."""
        attempts = int(self.ledger.update(update.id).cost.get("attempts", 0)) + 1
        why = f"{type(error).__name__}: {error}"
        update = self.ledger.advance_update(update.id, update.state, cost={"attempts": attempts})
        if attempts < ATTEMPTS:
            raise TrainingError(
                f"{update.id} broke off in attempt {attempts} of {ATTEMPTS}: {why}.", "It is tried again by itself."
            ) from error
        return self._fail(update, family, TrainingError(f"it broke off {attempts} times; the last reason is {why}."))

    def _count_death(self, update: UpdateRow) -> None:
        """Record that this process begins; the entry is removed at the end, unless the process dies (SIGKILL, memory,
        power). Raises TrainingError if others have died at the same place. A process that gets further before it dies
        begins at another place."""
        work, checkpoint = self.work_dir(update), self.work_dir(update) / CHECKPOINT
        saved = checkpoint.stat().st_mtime_ns if checkpoint.is_file() else 0
        place = f"{update.state} {saved} {len(list((work / PREPARED).glob('*')))}"
        died = self.ledger.update(update.id).cost.get(BEGAN) or {"died": -1}
        deaths = int(died["died"]) + 1 if died.get("place", place) == place else 0
        if deaths >= ATTEMPTS:
            raise TrainingError(
                f"the process ended {deaths} times in it ({update.state}) without saying why: killed, for memory?",
                "Look for `Out of memory` in the system's log; `ratchet trainer retry` tries it again.",
            )
        self.ledger.advance_update(update.id, cost={BEGAN: {"died": deaths, "place": place}})

    def _is_ended(self, update_id: str) -> bool:
        """True if an operator has ended an update, or a deletion waited too long for it; polled every ASK_SECONDS."""
        if time.monotonic() - self._asked < ASK_SECONDS:
            return False
        self._asked = time.monotonic()
        with suppress(LedgerError, StoreError):
            return self.ledger.is_finished(update_id) or update_id not in self.store.pins()
        return False

    def _data_is_gone(self, update: UpdateRow) -> bool:
        """True if the store has dropped the version that an update was pinned to."""
        latest = self.store.version()  # raises when the store cannot be read at all
        try:
            self.store.count(version=update.store_version)
        except StoreError:
            return latest > update.store_version
        return False

    def _abandon(self, update: UpdateRow) -> UpdateRow:
        error = f"version {update.store_version} of the sample store is not kept any more"
        progress_log.info(f"{update.id} is abandoned: {error}")
        metrics.update.finished(update.family, "abandoned")
        shutil.rmtree(self.work_dir(update), ignore_errors=True)
        self.store.unpin(update.id)
        return self.ledger.advance_update(update.id, "abandoned", error=error)

    def work_dir(self, update: UpdateRow) -> Path:
        return self.settings.update_folders / update.id


def waits_for_base(ledger: Ledger, home: Path, base: Base) -> str | None:
    """Reason to train nothing on a base now: the live release has another one, or an upgrade waits for its release."""
    if not isinstance(base, ClipBase):
        return None
    stable = ledger.stable()
    if stable is not None and stable.clip_base not in (None, base.digest):
        return (
            f"release {stable.number} has the base {shown(home, str(stable.clip_base))}, and this updater has "
            f"{base.name!r} ({digest12(base.digest)}): set base.clip to the live one and start again"
        )
    approved = ledger.approved_upgrade()
    if approved is not None and approved.old_base == base.digest:
        return (
            f"{approved.update_id} to the base {approved.new_name!r} passed the gate: `ratchet base switch "
            f"{approved.new_name}` releases it, `ratchet base upgrade {approved.new_name} --cancel` drops it"
        )
    return None


def run_update(
    settings: Settings,
    *,
    once: bool = False,
    recipe: str | None = None,
    family: Family | None = None,
    retry: bool = False,
) -> StepResult | None:
    """Run the updater until SIGTERM; with ``once``, one update. ``recipe``: train with this one, and only its family.
    ``family``: train only this family, with the recipe of the settings. Raises ConfigError: ``recipe`` is of another
    family than ``family``; TrainingError: with ``once``, if there is nothing to train, or the update failed."""
    stop = StopSignal()
    stop.install()
    with only_one(settings.home):
        service = UpdaterService(settings, load_recipe(recipe) if recipe else None, family=family, stop=stop)
        try:
            if not once:
                metrics.build.started("update")
                metrics.listen("update", settings.updater.metrics_port, settings.metrics_host)
                service.run_forever()
                return None
            outcome = service.step(now=True, retry=retry)
        except Stopped:
            progress_log.info("updater stops; the update goes on from its checkpoint next time")
            return None
    if outcome.update is None:
        raise TrainingError(f"no update was trained: {outcome.reason}.", "Publish new samples, or use --retry.")
    if outcome.update.state != "done":
        raise TrainingError(f"{outcome.update.id} {outcome.update.state}: {outcome.update.error}")
    return outcome
