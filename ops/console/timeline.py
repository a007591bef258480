"""Releases as a story: what changed in each, on what data, by which recipe, at what cost, judged how, by whom, why;
what the guard watches now, and what it took back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from core.ledger import Family, Ledger, ProposalRow, ReleaseRow, UpdateRow, VerdictRow
from serving.releases.guard import ACTOR

FAMILIES: Final[tuple[Family, Family]] = ("clip", "vlm")
NAMES: Final[Mapping[Family, str]] = {"clip": "CLIP", "vlm": "VLM"}
HISTORY = 500
"""Updates among which the origin of an adapter is looked for; what is older is shown by its name alone."""
ROWS_OF_AN_ACT = 4
"""Audit rows that the guard leaves with each release it makes, at most."""


@dataclass(frozen=True)
class Change:
    """One model's part of a release."""

    family: Family
    before: str | None
    after: str | None
    update: UpdateRow | None
    """The update that trained the adapter, where it was trained here."""
    verdict: VerdictRow | None
    withdrawn: str = ""
    """Why the guard withdrew the adapter, if it did."""
    collected: datetime | None = None
    """Time at which the garbage collector took its files, if it did."""

    @property
    def name(self) -> str:
        """CLIP or VLM."""
        return NAMES[self.family]


@dataclass(frozen=True)
class Entry:
    """One release of the timeline."""

    row: ReleaseRow
    kind: str
    changes: tuple[Change, ...]
    live: bool
    resident: bool
    stable: bool = False
    """True if it answers what a trial leaves."""
    taken_back: Mapping[str, Any] | None = None
    """Detail of the audit log where the guard took it back: reason, back_to, adapters, guardrails."""


def timeline(ledger: Ledger, resident: Mapping[int, object], limit: int = 30) -> list[Entry]:
    """The newest releases, newest first."""
    rows = ledger.releases(limit + 1)
    updates_by_adapter, stable, back = trained(ledger), ledger.stable(), taken_back(ledger, limit)
    names = [row.adapter(family) for row in rows for family in FAMILIES]
    withdrawn, collected = ledger.withdrawn(names), ledger.collected(names)

    def change(family: Family, before: str | None, after: str | None) -> Change:
        name = after or ""
        update = updates_by_adapter.get(name)
        verdict = ledger.verdict_of(update.id) if update else None
        return Change(family, before, after, update, verdict, withdrawn.get(name, ""), collected.get(name))

    entries = []
    for index, row in enumerate(rows[:limit]):
        older = rows[index + 1] if index + 1 < len(rows) else row  # the first one of all changes nothing
        pairs = [(family, older.adapter(family), row.adapter(family)) for family in FAMILIES]
        kind = "initial" if row.proposal_id is None else ledger.proposal(row.proposal_id).kind
        entries.append(
            Entry(
                row, kind, tuple(change(*pair) for pair in pairs if pair[1] != pair[2]), live=index == 0,
                resident=row.number in resident, taken_back=back.get(row.number),
                stable=index > 0 and stable is not None and row.number == stable.number,
            )
        )  # fmt: skip
    return entries


def trained(ledger: Ledger) -> dict[str, UpdateRow]:
    """The newest update that made each adapter."""
    return {update.adapter: update for update in reversed(ledger.updates(HISTORY)) if update.adapter}


def unreleased(ledger: Ledger) -> list[ProposalRow]:
    """The newest proposals that wait, or failed."""
    return [proposal for proposal in ledger.proposals(20) if proposal.state != "committed"]


def records(update: UpdateRow) -> int:
    """Number of records of the stream that an update learned from."""
    return sum(max(0, end - update.data_from.get(place, 0)) for place, end in update.data_to.items())


def ranges(update: UpdateRow) -> str:
    """The same, exactly: offsets by partition."""
    parts = (f"{place} from {update.data_from.get(place, 0)} to {end}" for place, end in sorted(update.data_to.items()))
    return "; ".join(parts)


def on_trial(live: ReleaseRow | None) -> ReleaseRow | None:
    """The canary or the shadow that is live."""
    return None if live is None or live.plain else live


def watching(status: Mapping[str, Any] | None, live: ReleaseRow | None) -> dict[str, Any] | None:
    """The guard's view, as the server tells it. None when nothing is watched, or it has not seen ``live`` yet."""
    watched: dict[str, Any] = {} if status is None else status["controller"]["rollout"]
    return watched if live is not None and watched.get("release") == live.number else None


def taken_back(ledger: Ledger, limit: int) -> dict[int, dict[str, Any]]:
    """Details of the audit log about releases that the guard took back, among the newest ``limit``."""
    found = {}
    for row in reversed(ledger.audit_rows(limit * ROWS_OF_AN_ACT, subject="release", actor=ACTOR)):
        number = row.subject.removeprefix("release ")
        if row.action == "withdraw" and number.isdecimal():
            found[int(number)] = row.detail
    return found
