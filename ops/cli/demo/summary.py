"""The end of the demo: a table for people, one JSON line for machines, and the checks that decide the exit status."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from ops.ledger import VerdictRow

ROLLBACK_SECONDS = 1.0  # what operators are promised
LOG_COLUMNS = 130  # a log has no width of its own, and 80 columns would cut the tables


@dataclass(frozen=True)
class Facts:
    """What the story measured. Times are seconds."""

    release: int
    naive: VerdictRow
    default: VerdictRow
    requests: int
    failed: int
    mixed: int
    prepare_seconds: float
    commit_seconds: float
    rollback_seconds: float
    event_to_searchable_seconds: float
    budget: dict[str, float]
    seconds: float
    report: str
    picture: str


def as_json(facts: Facts) -> dict[str, Any]:
    """The last line of the demo."""
    suites = {
        name: {
            "role": suite["role"],
            "before": round(suite["before"], 4),
            "after": round(suite["after"], 4),
            "ci": [round(bound, 4) for bound in suite["ci"]],
            "decision": suite["decision"],
        }
        for name, suite in facts.default.summary["suites"].items()
    }
    return {
        "release": facts.release,
        "naive_verdict": facts.naive.outcome,
        "naive_caught_by": list(facts.naive.summary["caught_by"]),
        "default_verdict": facts.default.outcome,
        "suites": suites,
        "requests": facts.requests,
        "failed": facts.failed,
        "mixed": facts.mixed,
        "prepare_seconds": round(facts.prepare_seconds, 3),
        "commit_seconds": round(facts.commit_seconds, 4),
        "rollback_seconds": round(facts.rollback_seconds, 4),
        "event_to_searchable_seconds": round(facts.event_to_searchable_seconds, 3),
        "budget": {name: round(value, 1) for name, value in facts.budget.items()},
        "seconds": round(facts.seconds, 1),
        "report": facts.report,
        "picture": facts.picture,
    }


def broken_promises(facts: Facts) -> list[str]:
    """What the demo should have shown and did not, in words; empty when all is well."""
    suites = facts.default.summary["suites"].values()
    losses = [name for name, suite in facts.naive.summary["suites"].items() if suite["decision"] == "failed"]
    checks = {
        f"{facts.failed} of {facts.requests} requests failed": facts.failed > 0 or facts.requests == 0,
        f"{facts.mixed} answers did not belong to the release they were stamped with": facts.mixed > 0,
        f"the naive update was {facts.naive.outcome}, not rejected": facts.naive.outcome != "rejected",
        "no retention suite caught the naive update": not losses,
        f"the default update was {facts.default.outcome}, not passed": facts.default.outcome != "passed",
        "no gain suite was won": not any(s["role"] == "gain" and s["decision"] == "passed" for s in suites),
        "a retention suite was lost": any(s["role"] == "retention" and s["decision"] != "passed" for s in suites),
        f"a rollback took {facts.rollback_seconds:.2f} s": facts.rollback_seconds >= ROLLBACK_SECONDS,
    }
    return [promise for promise, broken in checks.items() if broken]


def show(facts: Facts) -> None:
    """Print the table, where to look, and the JSON line (last)."""
    console = Console()
    table = Table(
        "suite", "role", "metric", "items", "base", "after", "difference", "decision", title="The default update"
    )
    for name, suite in facts.default.summary["suites"].items():
        span = f"{suite['after'] - suite['before']:+.3f}  [{suite['ci'][0]:+.3f}, {suite['ci'][1]:+.3f}]"
        table.add_row(
            name, suite["role"], suite["metric"], str(suite["n"]), f"{suite['before']:.3f}", f"{suite['after']:.3f}",
            span, suite["decision"], style="green" if suite["decision"] == "passed" else "red",
        )  # fmt: skip
    console.print(table)
    caught = ", ".join(facts.naive.summary["caught_by"])
    table = Table(show_header=False, title="The loop")
    for name, value in (
        ("naive update", f"{facts.naive.outcome}, caught by {caught}"),
        ("default update", f"{facts.default.outcome}; release {facts.release} is live"),
        ("requests during all of it", f"{facts.requests}: {facts.failed} failed, {facts.mixed} mixed"),
        ("prepare / commit / rollback", f"{facts.prepare_seconds:.2f} s / {facts.commit_seconds * 1000:.0f} ms / "
         f"{facts.rollback_seconds * 1000:.0f} ms"),
        ("event to searchable", f"{facts.event_to_searchable_seconds:.1f} s"),
        ("budget", ", ".join(f"{name} {value:,.0f}" for name, value in facts.budget.items()) + " MAF-GFLOPs"),
        ("took", f"{facts.seconds / 60:.1f} minutes"),
        ("gate report", facts.report),
        ("searches before and after", facts.picture),
    ):  # fmt: skip
        table.add_row(name, value)
    console.print(table)
    for promise in broken_promises(facts):
        console.print(f"[bold red]not as promised:[/bold red] {promise}")
    print(json.dumps(as_json(facts)), flush=True)
