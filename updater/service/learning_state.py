"""How learning stands, for the command line and the console: fresh items and alpha of each model, and what is missing
to judge an update or to hold it in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ConfigError, GateError, RatchetError
from core.ledger import Ledger
from core.settings import Settings
from serving.engines.clip_base import list_bases
from streams.store.sample_store import SampleStore
from updater.gate.interim_analyses import Plan, alpha_left
from updater.gate.suites import load_suites
from updater.recipes import Family, load_recipe
from updater.service import kept_candidates, triggers
from updater.service.triggers import FreshItems


@dataclass(frozen=True)
class LearningState:
    """One model's."""

    fresh: FreshItems
    plan: Plan
    """Of the candidate that is kept, or of the next one."""
    alpha: float
    """``gate.alpha``: for the gains of all candidates until the next release, and for the losses of each."""
    lacks: str = ""
    """What is missing to judge an update, so that none begins."""

    @property
    def spent(self) -> float:
        """By the candidates since the last release; each takes its share with its first look."""
        return self.alpha - alpha_left(self.alpha, self.plan.candidates + bool(self.plan.tested))

    @property
    def alpha_line(self) -> str:
        """For people."""
        spent = f"{self.spent:.2g} spent, {self.alpha - self.spent:.2g} left"
        return (
            f"alpha {self.alpha:g} for gains until the next release: {spent}; for losses, all of it for each candidate"
        )

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        candidate = self.fresh.candidate
        return {
            "fresh_items": self.fresh.items,
            "fresh_items_needed": self.fresh.needed,
            "kept": None if candidate is None else {
                "adapter": candidate.update.adapter, "update": candidate.update.id, "looks": len(self.plan.tested),
                "asked_again_with": candidate.next_items,
            },
            "lacks": self.lacks, "alpha": self.alpha, "alpha_spent": self.spent, "candidates": self.plan.candidates,
        }  # fmt: skip


def learning_states(settings: Settings, ledger: Ledger, store: SampleStore) -> dict[Family, LearningState]:
    """Of each family that has a base."""
    families: list[Family] = ["clip"]
    if settings.base.vlm and settings.base.vlm in list_bases(settings.home, "vlm"):
        families.append("vlm")
    return {family: _state(settings, ledger, store, family) for family in families}


def _state(settings: Settings, ledger: Ledger, store: SampleStore, family: Family) -> LearningState:
    halved = _searches(settings.updater.recipe if family == "clip" else settings.updater.vlm_recipe)
    fresh = triggers.fresh_of(settings, ledger, store, family, halved=halved)
    plan = kept_candidates.plan(
        settings.gate, ledger, family, fresh.candidate.update if fresh.candidate else None, halved=halved
    )
    learned = bool(triggers.learned(ledger.updates(triggers.HISTORY, family), triggers.incumbent_of(ledger, family)))
    return LearningState(fresh, plan, settings.gate.alpha, _lacks(settings, family, learned))


def _lacks(settings: Settings, family: Family, learned: bool) -> str:
    try:
        check_suites(settings, family, learned=learned, read=False)
        check_reference(settings.updater.reference)
    except (GateError, ConfigError) as error:
        return str(error)
    return ""


def _searches(recipe: str) -> bool:
    try:
        return bool(load_recipe(recipe).merge.search)
    except RatchetError:  # the updater says so
        return False


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
