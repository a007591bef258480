"""Previews the effect of an operator's action in words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal
from urllib.parse import urlencode

from core.errors import RatchetError
from core.ledger import Family, Ledger, ReleaseRow, answers
from ops.console.template_filters import adapter
from ops.console.timeline import FAMILIES, NAMES, on_trial, trained
from serving.releases.rollback import rollback_target

BASE = "base"
AGAINST = {"rejected": "The gate rejected this adapter", "inconclusive": "The gate found this adapter inconclusive"}
UNPROVEN = "No gate has passed this adapter, and it was never live"
PERCENT = re.compile(r"[0-9]{1,2}(\.[0-9]{1,3})?")
NO_SHARE = "Say how many percent of the requests it answers: more than 0 and less than 100."
REQUESTS = "Requests that have begun end under the release that they began with; no request fails or waits."
OFFERED = 60
Action = Literal["rollback", "release", "promote", "hold", "resume"]
WORDS: Mapping[Action, tuple[str, str]] = {
    "rollback": ("Roll back", "Roll back now"), "release": ("Release an adapter", "Release now"),
    "promote": ("Promote", "Promote now"), "hold": ("Hold updates", "Hold updates"),
    "resume": ("Resume updates", "Resume"),
}  # fmt: skip
How = Literal["all", "canary", "shadow"]
"""Requests that a release answers: all, a share, or none."""


@dataclass(frozen=True)
class Choice:
    """The contents of a form. An empty adapter means no change; ``base`` is the base without adapter."""

    to: int | None = None
    family: Family | None = None
    clip: str = ""
    vlm: str = ""
    how: How = "all"
    percent: str = ""
    """Percentage of requests as typed, for a canary."""

    @classmethod
    def of(cls, to: str, family: str, clip: str, vlm: str, how: How = "all", percent: str = "") -> Choice:
        """From a form's fields; invalid values count as missing, except that a percentage stays as typed."""
        number = int(to) if to.isascii() and to.isdigit() and int(to) > 0 else None
        named = next((each for each in FAMILIES if each == family), None)
        return cls(number, named, clip.strip(), vlm.strip(), how, percent.strip() if how == "canary" else "")

    @property
    def adapters(self) -> dict[str, str]:
        return {family: name for family, name in (("clip", self.clip), ("vlm", self.vlm)) if name}

    @property
    def share(self) -> float | None:
        """Share of requests, see :attr:`ReleaseRow.share`; None for an invalid percentage."""
        if self.how != "canary":
            return 1.0 if self.how == "all" else 0.0
        share = float(self.percent) / 100 if PERCENT.fullmatch(self.percent) else 0.0
        return share if share > 0 else None

    @property
    def query(self) -> str:
        said = {"to": self.to, "family": self.family, "clip": self.clip, "vlm": self.vlm}
        said |= {"how": self.how, "percent": self.percent} if self.how != "all" else {}
        return urlencode({name: value for name, value in said.items() if value})


@dataclass(frozen=True)
class ActionPreview:
    happens: tuple[str, ...]
    possible: bool = True
    warnings: tuple[str, ...] = ()
    force: tuple[str, ...] = ()
    """Adapters that the warnings concern; the server requires them to be confirmed."""
    targets: tuple[ReleaseRow, ...] = ()
    adapters: Mapping[Family, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    """Choices by family: name and the gate's verdict."""
    title: str = ""
    verb: str = ""
    live: int = 0
    """The current live release; the action is refused if it has changed by then."""


def preview(ledger: Ledger, action: Action, choice: Choice, resident: Mapping[int, object]) -> ActionPreview:
    live = ledger.live()
    if action == "rollback":
        made = _rollback(ledger, live, choice, resident)
    elif action == "release":
        made = _release(ledger, live, choice)
    elif action == "promote":
        made = _promote(ledger, live)
    else:
        made = _hold(ledger) if action == "hold" else _resume(ledger, live)
    title, verb = WORDS[action]
    return replace(made, title=title, verb=verb, live=live.number if live else 0)


def unproven(ledger: Ledger, names: Sequence[str | None]) -> dict[str, str]:
    """Adapters that need force to be released, with the reason in words."""
    withdrawn = ledger.withdrawn(names)
    judged = {verdict.adapter: verdict.outcome for verdict in reversed(ledger.verdicts(OFFERED))}
    return {
        name: f"The guard withdrew {name}: {withdrawn[name]}."
        if name in withdrawn
        else f"{AGAINST.get(judged.get(name, ''), UNPROVEN)}: {name}."
        for name in names
        if name is not None and ledger.unproven(name)
    }


def _rollback(ledger: Ledger, live: ReleaseRow | None, choice: Choice, resident: Mapping[int, object]) -> ActionPreview:
    targets = tuple(row for row in ledger.releases(OFFERED) if live is not None and row.number < live.number)
    try:
        target = rollback_target(ledger, FAMILIES if choice.family is None else (choice.family,), choice.to)
    except RatchetError as error:
        return ActionPreview((error.message,), False, targets=targets)
    assert live is not None
    others = ledger.stable() or live
    wanted = {family: target.get(family, others.adapter(family)) for family in FAMILIES}
    loaded = any(row.number in resident and _serves(row, wanted) for row in targets)
    speed = (
        "Its models are still loaded, so it takes less than a second."
        if loaded
        else "Its models are not loaded any more, so it takes as long as a new release. Until then nothing changes."
    )
    happens = (f"Release {live.number + 1} is made.", *_moves(live, others, wanted), speed, REQUESTS)
    return ActionPreview(happens, not (live.plain and _serves(live, wanted)), targets=targets)


def _release(ledger: Ledger, live: ReleaseRow | None, choice: Choice) -> ActionPreview:
    said = _said(ledger)
    offered = {
        family: tuple((name, said[name]) for name in said if name.startswith(f"{family}-")) for family in FAMILIES
    }
    if not choice.adapters or live is None:
        first = "Choose an adapter. What you do not name stays as it is."
        return ActionPreview((first,), False, adapters=offered)
    named = {family: None if name == BASE else name for family, name in choice.adapters.items()}
    others = ledger.stable() or live
    wanted = {family: named.get(family, others.adapter(family)) for family in FAMILIES}
    warned = unproven(ledger, list(named.values()))
    slow = "Every replica loads it first, and the search index follows; until all are ready nothing changes."
    happens = (*_answering(choice, live.number + 1, others.number), *_moves(live, others, wanted), slow, REQUESTS)
    same = (live.plain or choice.share != 1) and _serves(others, wanted)
    same = same or (_serves(live, wanted) and live.share == choice.share)
    return ActionPreview(happens, not same, tuple(warned.values()), tuple(warned), adapters=offered)


def _promote(ledger: Ledger, live: ReleaseRow | None) -> ActionPreview:
    trial = on_trial(live)
    if trial is None:
        return ActionPreview(("No canary and no shadow is live, so nothing can be promoted.",), False)
    wanted = {family: trial.adapter(family) for family in FAMILIES}
    happens = (
        f"Release {trial.number + 1} is made. What release {trial.number} tries "
        f"({answers(trial.share)}) answers everybody.",
        *_moves(None, ledger.stable() or trial, wanted),
        "Its models are loaded already, so it takes less than a second. The trial is over then.",
        REQUESTS,
    )
    return ActionPreview(happens, warnings=tuple(unproven(ledger, list(wanted.values())).values()))


def _hold(ledger: Ledger) -> ActionPreview:
    if (held := ledger.held()) is not None:
        return ActionPreview((f"Updates are on hold already, by {held.actor}: {held.reason}",), False)
    going_on = "Learning and judging go on. You can still release and roll back by hand."
    return ActionPreview(("Updates that pass the gate wait until someone resumes.", going_on))


def _resume(ledger: Ledger, live: ReleaseRow | None) -> ActionPreview:
    held, trial = ledger.held(), on_trial(live)
    if held is None:
        return ActionPreview(("Nothing is on hold.",), False)
    waiting = sum(proposal.kind == "update" for proposal in ledger.pending_proposals())
    happens = {
        0: "No update waits now. The next one that passes the gate is released at once.",
        1: "One update waits, and is released at once.",
    }.get(waiting, f"{waiting} updates wait, and are released one after the other.")
    if trial is not None:
        happens = f"Release {trial.number} is on trial. Updates wait until that is over."
    return ActionPreview((f"On hold by {held.actor}: {held.reason}", happens))


def _answering(choice: Choice, number: int, stable: int) -> list[str]:
    lasts = (
        "The guard compares both, and takes it back when a bound is broken. Otherwise the trial lasts until someone "
        "promotes it, rolls back or releases something else; updates wait until then."
    )
    if choice.share is None:
        return [NO_SHARE]
    if choice.share >= 1:
        return [f"Release {number} is made. It answers everybody."]
    if choice.share > 0:
        first = f"Release {number} is made as a canary: {100 * choice.share:.5g}% of the requests get it"
        return [f"{first}, a caller always or never. Release {stable} answers the others.", lasts]
    first = f"Release {number} is made as a shadow: it answers no request, and is only compared with release {stable}."
    return [first, lasts]


def _moves(live: ReleaseRow | None, others: ReleaseRow, wanted: Mapping[Family, str | None]) -> list[str]:
    """Lines about changes for requests answered by ``others``, and about a trial that ends."""
    lines, trial = [], on_trial(live)
    if trial is not None:
        lines.append(f"The trial of release {trial.number} ({answers(trial.share)}) ends.")
    for family in FAMILIES:
        before, after = others.adapter(family), wanted[family]
        if before == after:
            lines.append(f"The {NAMES[family]} stays as it is ({adapter(before)}).")
        else:
            lines.append(f"The {NAMES[family]} changes from {adapter(before)} to {adapter(after)}.")
    return lines


def _serves(row: ReleaseRow, wanted: Mapping[Family, str | None]) -> bool:
    return all(row.adapter(family) == wanted[family] for family in FAMILIES)


def _said(ledger: Ledger) -> dict[str, str]:
    verdicts: dict[str, str] = {verdict.adapter: verdict.outcome for verdict in reversed(ledger.verdicts(OFFERED))}
    known = dict.fromkeys(name for name, _ in reversed(trained(ledger).items()))
    for row in ledger.releases(OFFERED):
        known |= dict.fromkeys(name for name in (row.clip, row.vlm) if name)
    collected = ledger.collected(list(known))
    offered = [name for name in known if name not in collected][:OFFERED]
    verdicts |= dict.fromkeys(ledger.withdrawn(offered), "withdrawn")
    return {name: verdicts.get(name, "not judged") for name in offered}
