"""The guard's view of a release: which one is watched, what ingress processes counted, and exact one-sided tests on the
counts, so that noise does not take a release back.

Each guardrail counts bad events, and says how likely one may be for a release that is within its bound:

``errors``     of all failures, those of the watched release; it may have its part by requests, times the ratio
``latency``    inputs for which it took longer than the ratio allows; half of them may
``agreement``  inputs on which it disagrees with the incumbent; ``1 - min_agreement`` (``min_vlm_agreement``) may

It is broken when so many bad events would be too unlikely (binomial). The guard looks again and again, so each look
spends a part of :data:`FALSE_ALARM`: look k gets 1/(k(k+1)) of it, which adds up to all of it and no more. There is one
look in each :data:`LOOK_SECONDS`, and its number follows from the time, so that nothing has to be remembered.

Which release is watched, against which and until when, follows from the ledger alone, so every process agrees.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from core.ledger import Ledger
from core.ledger.rows import Family, ProposalKind, ReleaseRow
from core.settings.serving import Rollout

ACTOR = "guard"
_UNWATCHED: tuple[ProposalKind, ...] = ("initial", "rollback")
"""A first release has no incumbent; a rollback is what the guard itself does, and is never taken back by it."""
FALSE_ALARM = 0.01
"""Most that a release which is just within all bounds is taken back by chance, over the whole time it is watched."""
TESTS = 5
"""Errors once, latency and agreement for each model."""
LOOK_SECONDS = 2.0
Guardrail = Literal["errors", "latency", "agreement"]


@dataclass(frozen=True, slots=True)
class GuardTarget:
    """A release under guard."""

    release: ReleaseRow
    incumbent: ReleaseRow
    kind: ProposalKind
    until: float
    """Seconds since the epoch; infinite for a canary or a shadow, which is watched for as long as it is one."""

    @property
    def began(self) -> float:
        """When it was committed; seconds since the epoch."""
        return self.release.created_at.timestamp()

    def differs(self, family: Family) -> bool:
        """True if it changes this model. What it leaves alone needs no comparing."""
        return self.release.adapter(family) != self.incumbent.adapter(family)


def find_guard_target(ledger: Ledger, settings: Rollout, now: float) -> GuardTarget | None:
    """The live release, if it is watched at ``now`` (seconds since the epoch)."""
    with ledger.reading():
        live = ledger.live()
        incumbent = None if live is None else ledger.incumbent(live.number, live.clip_base)
        if live is None or incumbent is None:
            return None
        kind = "release" if live.proposal_id is None else ledger.proposal(live.proposal_id).kind
    until = live.created_at.timestamp() + settings.guard_seconds if live.plain else math.inf
    target = GuardTarget(live, incumbent, kind, until)
    if kind in _UNWATCHED or now >= until or not (target.differs("clip") or target.differs("vlm")):
        return None
    return target


@dataclass(slots=True)
class RequestCounts:
    """Requests that a release answered, and those of them that failed through no fault of the client."""

    requests: int = 0
    failed: int = 0

    def add(self, other: RequestCounts) -> None:
        self.requests += other.requests
        self.failed += other.failed


@dataclass(slots=True)
class ComparisonCounts:
    """Inputs of one model that the watched release and its incumbent both were given, unseen by clients."""

    inputs: int = 0
    """That both answered."""
    agreed: int = 0
    timed: int = 0
    slower: int = 0
    """Took longer than ``rollout.max_latency_ratio`` allows, of the timed ones."""
    tried: int = 0
    """Comparisons begun: several inputs may be one."""
    failed: int = 0
    """That the watched release could not answer."""
    incumbent_failed: int = 0
    dropped: int = 0
    """Not begun, because there was no room: clients come first."""

    def add(self, other: ComparisonCounts) -> None:
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass(slots=True)
class Observations:
    """Of one ingress, or of all of them. ``release`` is the one that is watched; 0: none."""

    release: int = 0
    requests: dict[int, RequestCounts] = field(default_factory=dict)
    """By release number: the resident ones."""
    compared: dict[Family, ComparisonCounts] = field(default_factory=dict)


def together(release: int, seen: Iterable[Observations]) -> Observations:
    """The sum over processes. Comparisons of another release than ``release`` (a late process's) are left out."""
    total = Observations(release)
    for one in seen:
        for number, answered in one.requests.items():
            total.requests.setdefault(number, RequestCounts()).add(answered)
        if one.release == release:
            for family, compared in one.compared.items():
                total.compared.setdefault(family, ComparisonCounts()).add(compared)
    return total


FORGIVEN = RequestCounts(requests=100, failed=1)
"""Put to the incumbent's count: one that answered nothing yet, or never failed, is not held to be perfect."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """One guardrail at one look."""

    guardrail: Guardrail
    family: Family | None
    bad: int
    of: int
    allowed: float
    """Probability of a bad event that a release within its bound may have."""
    chance: float
    """Of so many bad events or more, were the release within its bound."""
    level: float
    """The chance below which the guardrail counts as broken."""
    shown: str

    @property
    def broken(self) -> bool:
        return self.chance < self.level

    def detail(self) -> dict[str, Any]:
        """For the audit log."""
        return {**asdict(self), "broken": self.broken}


def look_number(seconds: float) -> int:
    """Number of the look that may be made so long after the commit; from 1."""
    return 1 + int(max(0.0, seconds) / LOOK_SECONDS)


def look(settings: Rollout, seen: Observations, incumbent: int, number: int) -> list[Evidence]:
    """Every guardrail that something is known about.

    Args:
        incumbent: number of the release it is compared with.
        number: of this look, from 1; see :func:`look_number`.
    """
    level = FALSE_ALARM / (TESTS * number * (number + 1))
    evidence = [_errors(settings, seen, incumbent, level)]
    for family, compared in sorted(seen.compared.items()):
        if compared.timed:
            evidence.append(_latency(settings, family, compared, level))
        if compared.inputs:
            evidence.append(_agreement(settings, family, compared, level))
    return evidence


def broken(evidence: Sequence[Evidence]) -> list[Evidence]:
    """The guardrails that are broken, the surest first."""
    return sorted((one for one in evidence if one.broken), key=lambda one: one.chance)


def _errors(settings: Rollout, seen: Observations, incumbent: int, level: float) -> Evidence:
    ours, theirs = RequestCounts(), RequestCounts()
    ours.add(seen.requests.get(seen.release, RequestCounts()))
    theirs.add(seen.requests.get(incumbent, RequestCounts()))
    for compared in seen.compared.values():
        ours.add(RequestCounts(compared.tried, compared.failed))
        theirs.add(RequestCounts(compared.tried, compared.incumbent_failed))
    shown = (
        f"{ours.failed} of {ours.requests} requests failed, {theirs.failed} of {theirs.requests} of release {incumbent}"
    )
    theirs.add(FORGIVEN)
    share = settings.max_error_ratio * ours.requests
    allowed = share / (share + theirs.requests)
    return _tested("errors", None, ours.failed, ours.failed + theirs.failed, allowed, level, shown)


def _latency(settings: Rollout, family: Family, compared: ComparisonCounts, level: float) -> Evidence:
    shown = f"{compared.slower} of {compared.timed} took more than {settings.max_latency_ratio:g} times as long"
    return _tested("latency", family, compared.slower, compared.timed, 0.5, level, shown)


def _agreement(settings: Rollout, family: Family, compared: ComparisonCounts, level: float) -> Evidence:
    bad = compared.inputs - compared.agreed
    least = settings.min_agreement if family == "clip" else settings.min_vlm_agreement
    shown = (
        f"{compared.agreed} of {compared.inputs} inputs agree ({compared.agreed / compared.inputs:.0%}), "
        f"at least {least:.0%} must"
    )
    return _tested("agreement", family, bad, compared.inputs, 1 - least, level, shown)


def _tested(
    guardrail: Guardrail, family: Family | None, bad: int, of: int, allowed: float, level: float, shown: str
) -> Evidence:
    from scipy.special import bdtrc  # here, because most processes that know a guard's types do not judge

    chance = float(bdtrc(bad - 1, of, allowed)) if bad else 1.0
    return Evidence(guardrail, family, bad, of, round(allowed, 6), chance, level, shown)
