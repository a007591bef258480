"""The history of releases: their changes, data, recipe, cost, verdict, actor and reason, and the guard's view."""

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
"""Updates searched for the origin of an adapter; older ones are shown by name only."""
ROWS_OF_AN_ACT = 4
"""Maximum audit rows that the guard writes per release."""


@dataclass(frozen=True)
class Change:
    family: Family
    before: str | None
    after: str | None
    update: UpdateRow | None
    verdict: VerdictRow | None
    withdrawn: str = ""
    collected: datetime | None = None
    """Time at which the garbage collector removed its files."""

    @property
    def name(self) -> str:
        return NAMES[self.family]


@dataclass(frozen=True)
class Entry:
    row: ReleaseRow
    kind: str
    changes: tuple[Change, ...]
    live: bool
    resident: bool
    stable: bool = False
    """True if it answers the requests that a trial does not."""
    taken_back: Mapping[str, Any] | None = None
    """Audit detail if the guard rolled it back: reason, back_to, adapters, guardrails."""


def timeline(ledger: Ledger, resident: Mapping[int, object], limit: int = 30) -> list[Entry]:
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
        older = rows[index + 1] if index + 1 < len(rows) else row  # the very first release changes nothing
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
    return {update.adapter: update for update in reversed(ledger.updates(HISTORY)) if update.adapter}


def unreleased(ledger: Ledger) -> list[ProposalRow]:
    return [proposal for proposal in ledger.proposals(20) if proposal.state != "committed"]


def records(update: UpdateRow) -> int:
    """Number of stream records that an update learned from."""
    return sum(max(0, end - update.data_from.get(place, 0)) for place, end in update.data_to.items())


def ranges(update: UpdateRow) -> str:
    """Offsets by partition that an update learned from."""
    parts = (f"{place} from {update.data_from.get(place, 0)} to {end}" for place, end in sorted(update.data_to.items()))
    return "; ".join(parts)


def on_trial(live: ReleaseRow | None) -> ReleaseRow | None:
    return None if live is None or live.plain else live


def watching(status: Mapping[str, Any] | None, live: ReleaseRow | None) -> dict[str, Any] | None:
    """The guard's view from the server's status; None if nothing is watched or it has not seen ``live`` yet."""
    watched: dict[str, Any] = {} if status is None else status["controller"]["rollout"]
    return watched if live is not None and watched.get("release") == live.number else None


def taken_back(ledger: Ledger, limit: int) -> dict[int, dict[str, Any]]:
    """Audit details of releases that the guard rolled back, by number, among the newest ``limit``."""
    found = {}
    for row in reversed(ledger.audit_rows(limit * ROWS_OF_AN_ACT, subject="release", actor=ACTOR)):
        number = row.subject.removeprefix("release ")
        if row.action == "withdraw" and number.isdecimal():
            found[int(number)] = row.detail
    return found
