"""`ratchet adapters import --judge`: the gate at once, in this process."""

from __future__ import annotations

from core.errors import TrainingError
from core.ledger import Ledger, UpdateRow, VerdictRow
from core.settings import Settings
from updater.exchange.importing import Import
from updater.loop.process import only_one
from updater.loop.service import UpdaterService
from updater.recipes import Family


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
