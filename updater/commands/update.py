"""``ratchet update``: the updater as a process."""

from __future__ import annotations

from core import metrics
from core.errors import TrainingError
from core.progress import say
from core.settings import Settings
from updater.loop.process import StopSignal, only_one
from updater.loop.service import StepResult, UpdaterService
from updater.recipes import Family, load_recipe
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
