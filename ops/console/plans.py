"""What an operator is about to do, in words, before he does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlencode

from ops.console.drawing import adapter
from ops.console.timeline import FAMILIES, NAMES, trained
from ops.errors import RatchetError
from ops.ledger import Family, Ledger, ReleaseRow
from serving.deployments.targets import rollback_target

BASE = "base"
AGAINST = {"rejected": "The gate rejected this adapter", "inconclusive": "The gate found this adapter inconclusive"}
UNPROVEN = "No gate has passed this adapter, and it was never live"
OFFERED = 60
"""Releases and adapters that a form offers."""


@dataclass(frozen=True)
class Choice:
    """What a form says. An empty adapter leaves what is live; ``base`` is the base alone."""

    to: int | None = None
    family: Family | None = None
    clip: str = ""
    vlm: str = ""

    @classmethod
    def of(cls, to: str, family: str, clip: str, vlm: str) -> Choice:
        """From a form's fields; what makes no sense counts as not said."""
        number = int(to) if to.isascii() and to.isdigit() and int(to) > 0 else None
        return cls(number, next((each for each in FAMILIES if each == family), None), clip.strip(), vlm.strip())

    @property
    def adapters(self) -> dict[str, str]:
        """Those that are named, by family."""
        return {family: name for family, name in (("clip", self.clip), ("vlm", self.vlm)) if name}

    @property
    def query(self) -> str:
        """The same choice as a link's query."""
        said = {"to": self.to, "family": self.family, "clip": self.clip, "vlm": self.vlm}
        return urlencode({name: value for name, value in said.items() if value})


@dataclass(frozen=True)
class Plan:
    """What will happen."""

    title: str
    verb: str
    """What the button says."""
    live: int
    """The release that is live now: if it is another one when the action arrives, nothing is done."""
    happens: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    possible: bool = True
    force: bool = False
    """Whether the server wants to be told that an adapter nothing has proved harmless is meant."""
    targets: tuple[ReleaseRow, ...] = ()
    adapters: Mapping[Family, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    """Choices by family: name and what the gate said."""


def plan(ledger: Ledger, action: str, choice: Choice, resident: Mapping[int, object]) -> Plan:
    """The plan of one action, from what the ledger has now."""
    live = ledger.live()
    if action == "rollback":
        return _rollback(ledger, live, choice, resident)
    if action == "release":
        return _release(ledger, live, choice)
    return _hold(ledger, live) if action == "hold" else _resume(ledger, live)


def _rollback(ledger: Ledger, live: ReleaseRow | None, choice: Choice, resident: Mapping[int, object]) -> Plan:
    title, verb, number = "Roll back", "Roll back now", live.number if live else 0
    targets = tuple(row for row in ledger.releases(OFFERED) if live is not None and row.number < live.number)
    families = FAMILIES if choice.family is None else (choice.family,)
    try:
        target = rollback_target(ledger, families, choice.to)
    except RatchetError as error:
        return Plan(title, verb, number, (error.message,), possible=False, targets=targets)
    assert live is not None
    wanted = {family: target.get(family, live.adapter(family)) for family in FAMILIES}
    loaded = any(row.number in resident and _serves(row, wanted) for row in targets)
    speed = (
        "Its models are still loaded, so it takes less than a second."
        if loaded
        else "Its models are not loaded any more, so it takes as long as a new release. Until then nothing changes."
    )
    happens = (*_moves(live, wanted), speed, _requests(number))
    return Plan(title, verb, number, happens, targets=targets, possible=not _serves(live, wanted))


def _release(ledger: Ledger, live: ReleaseRow | None, choice: Choice) -> Plan:
    number = live.number if live else 0
    said = _said(ledger)
    offered = {
        family: tuple((name, said[name]) for name in said if name.startswith(f"{family}-")) for family in FAMILIES
    }
    title, verb = "Release an adapter", "Release now"
    if not choice.adapters or live is None:
        first = "Choose an adapter. What you do not name stays as it is."
        return Plan(title, verb, number, (first,), possible=False, adapters=offered)
    named = {family: None if name == BASE else name for family, name in choice.adapters.items()}
    wanted = {family: named.get(family, live.adapter(family)) for family in FAMILIES}
    warnings = tuple(
        f"{AGAINST.get(said.get(name, ''), UNPROVEN)}: {name}."
        for name in named.values()
        if name and ledger.unproven(name)
    )
    slow = "Every replica loads it first, and the search index follows; until all are ready nothing changes."
    happens = (*_moves(live, wanted), slow, _requests(number))
    same = _serves(live, wanted)
    return Plan(title, verb, number, happens, warnings, not same, force=bool(warnings), adapters=offered)


def _hold(ledger: Ledger, live: ReleaseRow | None) -> Plan:
    happens: tuple[str, ...] = (
        "Updates that pass the gate wait until somebody resumes.",
        "Learning and judging go on. You can still release and roll back by hand.",
    )
    held = ledger.held()
    if held is not None:
        happens = (f"Updates are on hold already, by {held.actor}: {held.reason}",)
    return Plan("Hold updates", "Hold updates", live.number if live else 0, happens, possible=held is None)


def _resume(ledger: Ledger, live: ReleaseRow | None) -> Plan:
    waiting = sum(proposal.kind == "update" for proposal in ledger.pending_proposals())
    happens = {
        0: "No update waits now. The next one that passes the gate is released at once.",
        1: "One update waits, and is released at once.",
    }.get(waiting, f"{waiting} updates wait, and are released one after the other.")
    held = ledger.held()
    if held is None:
        return Plan("Resume updates", "Resume", live.number if live else 0, ("Nothing is on hold.",), possible=False)
    number = live.number if live else 0
    return Plan("Resume updates", "Resume", number, (f"On hold by {held.actor}: {held.reason}", happens))


def _moves(live: ReleaseRow, wanted: Mapping[Family, str | None]) -> list[str]:
    lines = [f"Release {live.number + 1} is made."]
    for family in FAMILIES:
        before, after = live.adapter(family), wanted[family]
        if before == after:
            lines.append(f"The {NAMES[family]} stays as it is ({adapter(before)}).")
        else:
            lines.append(f"The {NAMES[family]} changes from {adapter(before)} to {adapter(after)}.")
    return lines


def _requests(number: int) -> str:
    return f"Requests that have begun end under release {number}; no request fails or waits."


def _serves(row: ReleaseRow, wanted: Mapping[Family, str | None]) -> bool:
    return all(row.adapter(family) == wanted[family] for family in FAMILIES)


def _said(ledger: Ledger) -> dict[str, str]:
    """Adapters that could be released, newest first, and what is known of each."""
    verdicts = {verdict.adapter: verdict.outcome for verdict in reversed(ledger.verdicts(OFFERED))}
    known = dict.fromkeys(name for name, _ in reversed(trained(ledger).items()))
    for row in ledger.releases(OFFERED):
        known |= dict.fromkeys(name for name in (row.clip, row.vlm) if name)
    return {name: verdicts.get(name, "not judged") for name in list(known)[:OFFERED]}
