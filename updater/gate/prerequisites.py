"""What an update needs to be judged and held in place. Looked at before anything is spent on it, and by the doctor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from core.errors import ConfigError, GateError
from core.settings import Settings
from updater.gate.suites import load_suites
from updater.recipes import Family


def check_suites(settings: Settings, family: Family, *, learned: bool = False, read: bool = True) -> int:
    """The number of suites that ask models of a family.

    Args:
        learned: whether something was learned before, of which the gate makes suites itself.
        read: read all items, and do not only look for their folders.

    Raises:
        GateError: one cannot be read, or there is none that holds what the model can do.
    """
    suites = load_suites(settings.gate.suites, settings.home, family, settings.gate.max_items)
    for suite in suites:
        if read:
            suite.items()
        else:
            suite.check_folder()
    if not learned and not any(suite.role == "retention" for suite in suites):
        raise GateError(
            f"no retention suite asks a {family.upper()}: no update of it could pass the gate.",
            "Name one in gate.suites (`ratchet init` makes one of your pictures).",
        )
    return len(suites)


def check_reference(folders: Sequence[Path]) -> None:
    """Raises ConfigError where a folder of the reference pool is not there."""
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(
                f"the reference folder {folder} does not exist.", "Correct updater.reference in the settings."
            )
