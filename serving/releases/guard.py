"""The guard's view of a release: which one is watched, what ingress processes counted, and exact one-sided binomial
tests on the counts, so that noise does not cause a rollback.

Each guardrail counts bad events, and bounds the probability of one:

``errors``     the watched release's part of all failures; bound: its part of the requests, times :data:`FAILS`
``latency``    inputs that took more than :data:`SLOWER` times as long; bound: one half
``agreement``  inputs on which it disagrees with the incumbent; bound: ``1 - min_agreement`` (``min_vlm_agreement``)
``feedback``   answers that callers report as wrong; see :mod:`serving.releases.feedback_guard`

Looks repeat, so look k spends 1/(k(k+1)) of :data:`FALSE_ALARM`, which sums to all of it. There is one look in each
:data:`LOOK_SECONDS`, numbered by time, so that no state is needed. Which release is watched, against which and until
when, follows from the ledger alone, so every process agrees.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from core.ledger import Ledger
from core.ledger.rows import Family, ProposalKind, ReleaseRow
from core.settings.serving import Rollout

ACTOR = "guard"
_UNWATCHED: tuple[ProposalKind, ...] = ("initial", "rollback")
"""A first release has no incumbent; a rollback is what the guard itself does, and it never takes one back."""
FALSE_ALARM = 0.01
"""Highest probability of rolling back a release that is just within all bounds, over all the time it is watched."""
TESTS = 5
"""Errors once, latency and agreement for each model."""
LOOK_SECONDS = 2.0
FAILS = 2.0
"""Bound of the watched release's share of failed requests, as a multiple of its incumbent's."""
SLOWER = 2.0
"""An input that takes more than so many times as long as with the incumbent counts as slower."""
Guardrail = Literal["errors", "latency", "agreement", "feedback"]


@dataclass(frozen=True, slots=True)
class GuardTarget:
    release: ReleaseRow
    incumbent: ReleaseRow
    kind: ProposalKind
    until: float
    """Seconds since the epoch; infinite for a canary or a shadow, which is watched as long as it lasts."""

    @property
    def began(self) -> float:
        """Seconds since the epoch."""
        return self.release.created_at.timestamp()

    def differs(self, family: Family) -> bool:
        """True if the release changes this model. Unchanged models need no comparison."""
        return self.release.adapter(family) != self.incumbent.adapter(family)


def find_guard_target(ledger: Ledger, settings: Rollout, now: float) -> GuardTarget | None:
    """The live release, if it is watched at ``now`` (seconds since the epoch; 0: whenever it was released)."""
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
    """Requests that a release answered, and those that failed through no fault of the client."""

    requests: int = 0
    failed: int = 0

    def add(self, other: RequestCounts) -> None:
        self.requests += other.requests
        self.failed += other.failed


@dataclass(slots=True)
class ComparisonCounts:
    """Inputs of one model that both the watched release and its incumbent got, without clients seeing it."""

    inputs: int = 0
    """Answered by both."""
    agreed: int = 0
    timed: int = 0
    slower: int = 0
    """Of ``timed``: took more than :data:`SLOWER` times as long as with the incumbent."""
    tried: int = 0
    """Comparisons begun; one may have several inputs."""
    failed: int = 0
    """Comparisons that the watched release could not answer."""
    incumbent_failed: int = 0
    dropped: int = 0
    """Comparisons not begun because there was no room: clients come first."""

    def add(self, other: ComparisonCounts) -> None:
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass(slots=True)
class Observations:
    """Counts of one ingress, or of all. ``release`` is the watched one; 0: none."""

    release: int = 0
    requests: dict[int, RequestCounts] = field(default_factory=dict)
    """By number of the resident releases."""
    compared: dict[Family, ComparisonCounts] = field(default_factory=dict)


def together(release: int, seen: Iterable[Observations]) -> Observations:
    """The sum over processes, without comparisons of other releases than ``release`` (from a late process)."""
    total = Observations(release)
    for one in seen:
        for number, answered in one.requests.items():
            total.requests.setdefault(number, RequestCounts()).add(answered)
        if one.release == release:
            for family, compared in one.compared.items():
                total.compared.setdefault(family, ComparisonCounts()).add(compared)
    return total


FORGIVEN = RequestCounts(requests=100, failed=1)
"""Added to the incumbent's count, so that an incumbent without failures is not taken for perfect."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """One guardrail at one look."""

    guardrail: Guardrail
    family: Family | None
    bad: int
    of: int
    allowed: float
    """Probability of a bad event that is within the bound."""
    chance: float
    """Probability of this many bad events or more for a release within its bound."""
    level: float
    """The guardrail is broken when ``chance`` is below this."""
    shown: str

    @property
    def broken(self) -> bool:
        return self.chance < self.level

    def detail(self) -> dict[str, Any]:
        return {**asdict(self), "broken": self.broken}


def look_number(seconds: float) -> int:
    """Number of the look that is due this long after the commit; from 1."""
    return 1 + int(max(0.0, seconds) / LOOK_SECONDS)


def look(settings: Rollout, seen: Observations, incumbent: int, number: int) -> list[Evidence]:
    """Test every guardrail with data. ``incumbent``: number of its release. ``number``: see :func:`look_number`."""
    level = FALSE_ALARM / (TESTS * number * (number + 1))
    evidence = [_errors(settings, seen, incumbent, level)]
    for family, compared in sorted(seen.compared.items()):
        if compared.timed:
            shown = f"{compared.slower} of {compared.timed} took more than {SLOWER:g} times as long"
            evidence.append(_tested("latency", family, compared.slower, compared.timed, 0.5, level, shown))
        if compared.inputs:
            least = settings.min_agreement if family == "clip" else settings.min_vlm_agreement
            share = compared.agreed / compared.inputs
            shown = f"{compared.agreed} of {compared.inputs} inputs agree ({share:.0%}), at least {least:.0%} must"
            bad = compared.inputs - compared.agreed
            evidence.append(_tested("agreement", family, bad, compared.inputs, 1 - least, level, shown))
    return evidence


def broken(evidence: Sequence[Evidence]) -> list[Evidence]:
    """The broken guardrails, the least likely to be chance first."""
    return sorted((one for one in evidence if one.broken), key=lambda one: one.chance)


def _errors(settings: Rollout, seen: Observations, incumbent: int, level: float) -> Evidence:
    ours, theirs = (replace(seen.requests.get(number, RequestCounts())) for number in (seen.release, incumbent))
    for compared in seen.compared.values():
        ours.add(RequestCounts(compared.tried, compared.failed))
        theirs.add(RequestCounts(compared.tried, compared.incumbent_failed))
    shown = (
        f"{ours.failed} of {ours.requests} requests failed, {theirs.failed} of {theirs.requests} of release {incumbent}"
    )
    theirs.add(FORGIVEN)
    share = FAILS * ours.requests
    allowed = share / (share + theirs.requests)
    return _tested("errors", None, ours.failed, ours.failed + theirs.failed, allowed, level, shown)


def _tested(
    guardrail: Guardrail, family: Family | None, bad: int, of: int, allowed: float, level: float, shown: str
) -> Evidence:
    from scipy.special import bdtrc  # here, because most importers only need the types

    chance = float(bdtrc(bad - 1, of, allowed)) if bad else 1.0
    return Evidence(guardrail, family, bad, of, round(allowed, 6), chance, level, shown)
