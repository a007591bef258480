"""The triggers of `updater.triggers`: an update begins when any of them holds, and there is a new sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Final

from cronsim import CronSim

from core.ledger import Ledger
from core.ledger.wrong_answers import ALPHA, ROUTES, Reports, highest_rate, p_value, without_loudest
from core.settings.updates import Trigger, Updater
from streams.store.sample_store import SampleStore
from updater.data.draw import HAVING
from updater.recipes import Family
from updater.service.drift import FIRST_LOOK, drift_of, look_at

WRONG_RATE_DAYS: Final = 7


@dataclass(frozen=True)
class NewSamples:
    """Training samples that an update may begin with."""

    store: SampleStore
    family: Family
    version: int
    after: Mapping[str, int]
    """Next offsets of what was learned or tried before, by partition."""
    count: int
    began: datetime | None
    """Start of the family's last update; None before the first."""

    @cached_property
    def oldest(self) -> datetime:
        rows = self.store.scan(
            version=self.version, split="train", after=self.after, columns=["ingested_at"], having=HAVING[self.family]
        )
        moments = (moment for moment in rows["ingested_at"].to_pylist() if moment is not None)
        return min(moments, default=datetime.now(UTC)).astimezone(UTC)

    @cached_property
    def age(self) -> float:
        """Seconds that the oldest one has waited."""
        return (datetime.now(UTC) - self.oldest).total_seconds()


@dataclass(frozen=True)
class Check:
    holds: bool
    text: str
    """Why the update begins, or what is waited for."""


def check_triggers(settings: Updater, ledger: Ledger, new: NewSamples) -> Check:
    """The first trigger that holds, with its name in the text; else all that are waited for. Raises LedgerError,
    StoreError."""
    missing = []
    for name, check in CHECKS.items():
        if name not in settings.triggers:
            continue
        found = check(settings, ledger, new)
        if found.holds:
            return Check(True, f"{name}: {found.text}")
        missing.append(found.text)
    return Check(False, "; ".join(missing))


def _samples(settings: Updater, ledger: Ledger, new: NewSamples) -> Check:
    if new.count >= settings.min_new_samples:
        return Check(True, f"{new.count:,} new")
    return Check(False, f"{new.count:,} of {settings.min_new_samples:,} new samples")


def _age(settings: Updater, ledger: Ledger, new: NewSamples) -> Check:
    waited = f"the oldest sample waiting for {new.age:,.0f} of {settings.max_wait_seconds:,.0f} s"
    return Check(new.age >= settings.max_wait_seconds, waited)


def _cron(settings: Updater, ledger: Ledger, new: NewSamples) -> Check:
    """Due once after the last update began; before the first update, after the oldest new sample was stored."""
    due = next(CronSim(settings.cron, new.began or new.oldest))
    holds = due <= datetime.now(UTC)
    return Check(holds, f"`{settings.cron}` {'was' if holds else 'is'} due at {due:%Y-%m-%d %H:%M} UTC")


def _wrong_rate(settings: Updater, ledger: Ledger, new: NewSamples) -> Check:
    """Callers report more answers of the stable release as wrong since midnight a week ago, or since the last update
    began, than before. A false alarm has a chance of at most ALPHA for each day and each update."""
    if (stable := ledger.stable()) is None:
        return Check(False, "no reported answers: no release is live")
    week = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=WRONG_RATE_DAYS)
    since = max(week, new.began or week)
    now = Reports.sum(without_loudest(ledger.feedback_by_caller(stable.number, ROUTES[new.family], since=since)))
    before = Reports.sum(ledger.feedback_by_caller(stable.number, ROUTES[new.family], before=since))
    return Check(
        p_value(now, highest_rate(before)) <= ALPHA / 2,
        f"{now.wrong} of {now.of} answers of release {stable.number} reported as wrong since {since:%Y-%m-%d %H:%M}, "
        f"{before.wrong} of {before.of} before",
    )


def _drift(settings: Updater, ledger: Ledger, new: NewSamples) -> Check:
    size = look_at(new.count)
    if not size:
        return Check(False, f"{new.count} of {FIRST_LOOK} new samples to look for drift")
    if not new.after:
        return Check(True, "nothing of the stream was learned before")
    drift = drift_of(new.store, HAVING[new.family], tuple(sorted(new.after.items())), size)
    return Check(drift.found, drift.text)


CHECKS: Final[Mapping[Trigger, Callable[[Updater, Ledger, NewSamples], Check]]] = {
    "samples": _samples, "cron": _cron, "wrong_rate": _wrong_rate, "age": _age, "drift": _drift,
}  # fmt: skip
"""In the order of their prices."""
