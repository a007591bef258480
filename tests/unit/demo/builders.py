from __future__ import annotations

from datetime import UTC, datetime

from core.ledger.rows import GateOutcome, VerdictRow
from demo.story.summary import Facts, Lesson

BEGAN = datetime(2026, 1, 1, 12, tzinfo=UTC)


def verdict(outcome: GateOutcome, retention: str, gain: str = "passed", after: float = 0.6) -> VerdictRow:
    suite = {
        "role": "retention", "metric": "recall@5", "n": 200, "base": 0.5, "before": 0.5, "after": after,
        "ci": [0.02, 0.18], "margin": 0.05, "decision": retention,
    }  # fmt: skip
    fresh = {**suite, "role": "gain", "margin": None, "decision": gain}
    caught = ["emoji"] if retention == "failed" else []
    summary = {"suites": {"emoji": suite, "fresh.new": fresh}, "caught_by": caught}
    return VerdictRow(
        update_id="u1", adapter="clip-a", outcome=outcome, report_key="reports/u1", summary=summary, created_at=BEGAN
    )


def lesson(report: str = "report.html", naive_report: str = "") -> Lesson:
    return Lesson(
        naive=verdict("rejected", "failed", after=0.31), default=verdict("passed", "passed"), prepare_seconds=1.0,
        commit_seconds=0.018, rollback_seconds=0.042, budget={"planned": 10.0, "spent": 9.0}, report=report,
        naive_report=naive_report,
    )  # fmt: skip


def facts(of_clip: Lesson, of_vlm: Lesson | None, vlm_requests: int = 0) -> Facts:
    return Facts(
        release=4, clip=of_clip, vlm=of_vlm, requests=1234, vlm_requests=vlm_requests, failed=0, mixed=0,
        event_to_searchable_seconds=2.4, seconds=300.0, first_search_seconds=51.0,
    )  # fmt: skip
