"""`ratchet trainer`, `ratchet base upgrade` and `ratchet adapters import --judge`, as functions that a Python prompt
can call too.
"""

from __future__ import annotations

import shutil
from contextlib import suppress

from core import metrics
from core.errors import TrainingError
from core.ledger import Ledger, UpdateRow, VerdictRow
from core.progress import say
from core.settings import Settings
from streams.store.sample_store import SampleStore
from updater.recipes import Family, load_recipe
from updater.service.base_replay import Plan, begin, cancel, plan_of, plan_replay, unfinished
from updater.service.exchange import Import
from updater.service.process import StopSignal, only_one
from updater.service.update_loop import StepResult, UpdaterService
from updater.training.workers import Stopped


def run_update(
    settings: Settings,
    *,
    once: bool = False,
    recipe: str | None = None,
    family: Family | None = None,
    retry: bool = False,
) -> StepResult | None:
    """The updater, until SIGTERM; with ``once``, one update.

    Args:
        recipe: train with this one, and only its family.
        family: train only this family, with the recipe of the settings.

    Raises:
        ConfigError: ``recipe`` is of another family than ``family``.
        TrainingError: with ``once``, when there is nothing to train, or the update failed.
    """
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
            say("updater stops; the update goes on from its checkpoint next time")
            return None
    if outcome.update is None:
        raise TrainingError(f"no update was trained: {outcome.reason}.", "Publish new samples, or use --retry.")
    if outcome.update.state != "done":
        raise TrainingError(f"{outcome.update.id} {outcome.update.state}: {outcome.update.error}")
    return outcome


def plan_command(settings: Settings, name: str, gflops: float | None = None) -> Plan:
    """What an upgrade would train and cost; nothing is recorded. Raises: see :func:`plan_replay`."""
    ledger, store = Ledger.open(settings.ledger), SampleStore(settings.lake)
    try:
        return plan_of(settings, store, plan_replay(settings, ledger, store, name, gflops))
    finally:
        ledger.close()


def begun(settings: Settings, name: str) -> UpdateRow | None:
    """The unfinished upgrade to a base, if there is one. Raises TrainingError when there is one to another base."""
    ledger = Ledger.open(settings.ledger)
    try:
        return unfinished(ledger, name)
    finally:
        ledger.close()


def begin_command(settings: Settings, plan: Plan, actor: str) -> UpdateRow:
    """Record an upgrade, which the updater of this home takes up. Raises LedgerError, StoreError."""
    ledger = Ledger.open(settings.ledger)
    try:
        return begin(ledger, SampleStore(settings.lake), plan.replay, actor)
    finally:
        ledger.close()


def finish_command(settings: Settings, update_id: str) -> tuple[UpdateRow, VerdictRow | None]:
    """Train and judge an upgrade in this process, from where it is; with SIGTERM it stops at a checkpoint.

    Raises:
        TrainingError: an updater works here, which takes the upgrade up by itself; or it waits for something.
    """
    ledger = Ledger.open(settings.ledger)
    stop = StopSignal()
    try:
        with only_one(settings.home, wait=False):
            stop.install()
            service = UpdaterService(settings, family="clip", stop=stop)
            with suppress(Stopped):
                while not ledger.is_finished(update_id):
                    outcome = service.step()
                    if outcome.update is None:
                        raise TrainingError(f"{update_id} waits: {outcome.reason}.", "Run the command again later.")
            if not ledger.is_finished(update_id):
                say(f"{update_id} stops; it goes on from its checkpoint next time")
        return ledger.update(update_id), ledger.verdict_of(update_id)
    finally:
        ledger.close()


def cancel_command(settings: Settings, name: str) -> UpdateRow:
    """Drop the upgrade to a base. Raises TrainingError when there is none, or an updater works on it."""
    ledger = Ledger.open(settings.ledger)
    try:
        with only_one(settings.home, wait=False):
            update = cancel(ledger, SampleStore(settings.lake), name)
            shutil.rmtree(settings.update_folders / update.id, ignore_errors=True)
        return update
    finally:
        ledger.close()


def gate_import(settings: Settings, imported: Import) -> tuple[UpdateRow, VerdictRow | None]:
    """Judge and propose an imported adapter, unless that was done before.

    Raises:
        TrainingError: an updater works here, an older update is not finished, or what it would be compared with is
            not decided: the updater judges it when it can.
    """
    ledger = Ledger.open(settings.ledger)
    update = imported.update
    family: Family = "vlm" if update.family == "vlm" else "clip"
    try:
        if not ledger.is_finished(update.id):
            with only_one(settings.home, wait=False):
                oldest = ledger.unfinished_update(family)
                if oldest is not None and oldest.id != update.id:
                    raise TrainingError(
                        f"{oldest.id} is not finished.", "Start the updater: it finishes both, one after the other."
                    )
                outcome = UpdaterService(settings, family=family).step()
            if outcome.update is None:
                raise TrainingError(
                    f"{update.id} cannot be judged now: {outcome.reason}.", "The updater does it later."
                )
        return ledger.update(update.id), ledger.verdict_of(update.id)
    finally:
        ledger.close()
