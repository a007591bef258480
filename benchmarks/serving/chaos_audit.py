"""The audit of a chaos run: requests that failed although nothing that they needed was killed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from demo.load.probes import RequestKind
from demo.load.traffic import CheckedSample

Process = str
"""``encoder``, ``vlm``, ``catalog``, ``ingress``, ``controller``."""
NEEDS: Final[dict[RequestKind, frozenset[Process]]] = {
    "embeddings": frozenset({"ingress", "encoder"}),
    "classify": frozenset({"ingress", "encoder"}),
    "search": frozenset({"ingress", "encoder", "catalog"}),
    "chat": frozenset({"ingress", "vlm"}),
}
"""Processes that a request passes through."""
EVIDENCE: Final = 5


@dataclass(frozen=True, slots=True)
class Kill:
    """A process that was killed. ``began`` and ``ended``: before and after the signals, seconds since 1970."""

    process: Process
    step: str
    """State of a release's proposal when the process was killed."""
    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class Rollback:
    """One requested rollback.

    ``seconds`` go from the request, or from the moment at which the ledger answered again if that is later, to the
    answer that it is live. A refused call is retried meanwhile; ``errors`` has the errors until then.
    """

    seconds: float
    done: bool
    errors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """A rollback requested while the ledger was down, so that none could be committed."""

    seconds: float
    status: int
    """HTTP; 503 is right, 0 is no answer."""
    message: str = ""


@dataclass
class StateReport:
    """Events of one state, from entering it until all was well again."""

    state: str
    began: float = 0.0
    ended: float = 0.0
    skipped: str = ""
    kills: list[Kill] = field(default_factory=list)
    rollbacks: list[Rollback] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    releases: int = 0
    releases_failed: int = 0
    commits_lost: int = 0
    """COMMITs that the ledger never got, or whose answer was lost."""
    problems: list[str] = field(default_factory=list)
    requests: int = 0
    failed: int = 0
    """Beyond those in flight on a process that was killed."""
    failed_on_killed: int = 0
    mixed: int = 0
    evidence: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """For the JSON line."""
        if self.skipped:
            return {"state": self.state, "skipped": self.skipped}
        return {
            "state": self.state,
            "seconds": round(self.ended - self.began, 1),
            "requests": self.requests,
            "failed_beyond_killed": self.failed,
            "failed_on_killed": self.failed_on_killed,
            "mixed": self.mixed,
            "killed_at": [kill.step for kill in self.kills],
            "commits_lost": self.commits_lost,
            "rollbacks": len(self.rollbacks),
            "rollbacks_failed": sum(not each.done for each in self.rollbacks),
            "rollback_seconds": [round(each.seconds, 3) for each in self.rollbacks],
            "refusals": [asdict(each) | {"seconds": round(each.seconds, 3)} for each in self.refusals],
            "releases": self.releases,
            "releases_failed": self.releases_failed,
            "problems": self.problems[:EVIDENCE],
            "evidence": self.evidence,
        }


def audit(reports: Sequence[StateReport], samples: Sequence[CheckedSample]) -> None:
    """Count the requests of each state. A request sent between two states counts for the one before. ``samples``: all
    requests, with the fault of each in ``problem`` (``mixed``, or an error).
    """
    entered = sorted((report for report in reports if not report.skipped), key=lambda report: report.began)
    kills = [kill for report in entered for kill in report.kills]
    for sample in samples:
        before = [report for report in entered if report.began <= sample.began]
        report = before[-1] if before else entered[0] if entered else None
        if report is not None:
            _count(report, sample, kills)


def _count(report: StateReport, sample: CheckedSample, kills: Sequence[Kill]) -> None:
    report.requests += 1
    if sample.problem == "mixed":
        report.mixed += 1
    elif sample.problem and any(on_killed(sample, kill) for kill in kills):
        report.failed_on_killed += 1
    elif sample.problem:
        report.failed += 1
        if len(report.evidence) < EVIDENCE:
            after = sample.began - report.began
            report.evidence.append(f"{sample.kind} sent {after:.1f} s after the state began: {sample.problem[:200]}")


def on_killed(sample: CheckedSample, kill: Kill) -> bool:
    in_flight = sample.began <= kill.ended and sample.due + sample.seconds >= kill.began
    return in_flight and kill.process in NEEDS[sample.kind]


def totals(reports: Sequence[StateReport]) -> dict[str, Any]:
    """The figures of the whole run."""
    rollbacks = [each for report in reports for each in report.rollbacks]
    refusals = [each for report in reports for each in report.refusals]
    return {
        "requests": sum(report.requests for report in reports),
        "failed_beyond_killed": sum(report.failed for report in reports),
        "failed_on_killed": sum(report.failed_on_killed for report in reports),
        "mixed": sum(report.mixed for report in reports),
        "kills": sum(len(report.kills) for report in reports),
        "commits_lost": sum(report.commits_lost for report in reports),
        "rollbacks": len(rollbacks),
        "rollbacks_failed": sum(not each.done for each in rollbacks),
        "rollback_seconds_max": round(max((each.seconds for each in rollbacks), default=0.0), 3),
        "refusals": len(refusals),
        "refusals_not_503": sum(each.status != 503 for each in refusals),
        "refusal_seconds_max": round(max((each.seconds for each in refusals), default=0.0), 3),
        "problems": sum(len(report.problems) for report in reports),
        "states": [report.figures() for report in reports],
    }
