"""Guarded rollouts in words: what the guard watches, what it saw, and why it took a release back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.ledger import Ledger, ReleaseRow
from serving.releases.guard import ACTOR

ROWS_OF_AN_ACT = 4
"""Audit rows that the guard leaves with each release it makes, at most."""


@dataclass(frozen=True)
class Finding:
    """One guardrail and the counts behind it."""

    guardrail: str
    family: str | None
    shown: str
    broken: bool
    chance: float
    """Of such counts, were the release just within the bound."""

    @property
    def name(self) -> str:
        """What is measured, and of which model."""
        named = self.guardrail.capitalize()
        return f"{named} of the {self.family.upper()}" if self.family else named


@dataclass(frozen=True)
class Watch:
    """What the guard looks at now."""

    release: int
    incumbent: int
    seconds: float
    seconds_left: float | None
    """None while it is on trial: then the guard watches as long as that lasts."""
    findings: tuple[Finding, ...]
    compared: int
    """Inputs that both releases answered."""


@dataclass(frozen=True)
class TakenBack:
    """What the audit log says of a release that the guard took back."""

    reason: str
    back_to: int | None
    adapters: tuple[str, ...]
    findings: tuple[Finding, ...]


def watching(status: Mapping[str, Any] | None, live: ReleaseRow | None) -> Watch | None:
    """From what the server says of itself. None when nothing is watched, or the guard has not seen ``live`` yet."""
    watched = {} if status is None else status["controller"]["rollout"]
    if live is None or watched.get("release") != live.number:
        return None
    compared = sum(seen["inputs"] for seen in watched["compared"].values())
    return Watch(
        live.number,
        watched["incumbent"],
        watched["seconds"],
        watched["seconds_left"],
        _findings(watched["guardrails"]),
        compared,
    )


def taken_back(ledger: Ledger, limit: int) -> dict[int, TakenBack]:
    """By release, as far as the newest ``limit`` releases go."""
    found = {}
    for row in reversed(ledger.audit_rows(limit * ROWS_OF_AN_ACT, subject="release", actor=ACTOR)):
        number = row.subject.removeprefix("release ")
        if row.action == "withdraw" and number.isdecimal():
            detail = row.detail
            found[int(number)] = TakenBack(
                detail["reason"],
                detail.get("back_to"),
                tuple(detail["adapters"]),
                _findings(detail.get("guardrails", ())),
            )
    return found


def on_trial(live: ReleaseRow | None) -> ReleaseRow | None:
    """The canary or the shadow that is live."""
    return None if live is None or live.plain else live


def _findings(guardrails: Sequence[Mapping[str, Any]]) -> tuple[Finding, ...]:
    """What is out of bounds first."""
    found = [Finding(one["guardrail"], one["family"], one["shown"], one["broken"], one["chance"]) for one in guardrails]
    return tuple(sorted(found, key=lambda one: not one.broken))
