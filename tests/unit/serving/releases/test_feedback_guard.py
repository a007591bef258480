"""The guard takes back what callers report as wrong more often, and nothing because it looks often."""

from __future__ import annotations

from datetime import timedelta
from unittest.mock import patch

import numpy as np
import pytest

from core.ledger import Ledger
from core.ledger.feedback import CallerReports
from core.ledger.rows import FeedbackRow, FeedbackVerdict, utc_now
from core.ledger.wrong_answers import ALPHA, Reports, highest_rate, p_value, without_loudest
from core.settings.serving import Rollout
from serving.releases import auto_rollback
from serving.releases.auto_rollback import Guard
from tests.unit.serving.releases.plain_replicas import Server

STREAMS, LOOKS = 200, 4000


def first_alarm(random: np.random.Generator, before: float, now: float, reports: int = 1000) -> int | None:
    """Reported answers of a release until it is taken back; None: not within LOOKS, with a look after each."""
    rate = highest_rate(Reports(int(random.binomial(reports, before)), reports))
    wrong = np.cumsum(random.random(LOOKS) < now)
    alarms = (of for of in range(10, LOOKS, 10) if p_value(Reports(int(wrong[of - 1]), of), rate) < ALPHA / 2)
    return next(alarms, None)


def test_an_equal_release_is_hardly_ever_taken_back_however_often_one_looks_and_a_worse_one_is() -> None:
    random = np.random.default_rng(0)
    assert sum(first_alarm(random, 0.05, 0.05) is not None for _ in range(STREAMS)) <= ALPHA * STREAMS
    alarms = [first_alarm(random, 0.05, 0.10) for _ in range(20)]
    assert sum(alarm is not None for alarm in alarms) >= 16
    assert all(first_alarm(random, 0.05, 0.4, reports=100) for _ in range(20))


def test_the_loudest_fifth_does_not_count_and_no_report_says_nothing() -> None:
    callers = [CallerReports(f"honest-{number}", 1, 20) for number in range(9)] + [CallerReports("hostile", 500, 500)]
    kept = without_loudest(callers)
    assert len(kept) == 8 and Reports.sum(kept) == Reports(8, 160)
    assert without_loudest([CallerReports("one", 5, 5)]) == [CallerReports("one", 5, 5)]
    assert p_value(Reports(0, 0), 0.1) == 1.0 and p_value(Reports(5, 5), 1.0) == 1.0
    assert p_value(Reports(10_000, 10_000), 0.5) == 0.0
    assert highest_rate(Reports(3, 3)) == 1.0 and highest_rate(Reports(0, 0)) == 1.0


def report(
    ledger: Ledger, release: int, wrong: int, of: int, verdict: FeedbackVerdict = "wrong", days: float = 0
) -> None:
    for number in range(of):
        name = f"{release}-{number}"
        ledger.record_feedback(FeedbackRow(
            id=f"{name:0>64}", caller="app", release=release, route="classify", input="0" * 32, answered_at=utc_now(),
            verdict=verdict if number < wrong else "right", detail={}, created_at=utc_now() - timedelta(days=days),
        ))  # fmt: skip


@pytest.fixture
async def server(ledger: Ledger) -> Server:
    made = Server(ledger)
    await made.start()
    report(ledger, 1, wrong=1, of=60, days=1)
    await made.create(clip="a")
    return made


async def test_a_release_that_is_reported_as_wrong_is_taken_back_long_after_it_went_live(server: Server) -> None:
    with server.ledger.database.write() as session:
        for row in session.query(type(server.live_row)):
            row.created_at -= timedelta(hours=12)
    guard = Guard(server, Rollout())
    assert await guard.step() is None
    report(server.ledger, 2, wrong=20, of=40, verdict="correct")
    assert await guard.step() is None, "the next count is a minute later"
    with patch.object(auto_rollback, "REPORTS_SECONDS", 0.0):
        guard._reports_due = 0.0
        outcome = await guard.step()
    assert outcome is not None and server.live == (3, None, None)
    assert "20 of 40 reported answers are wrong, 1 of 60 of release 1" in server.live_row.reason
    assert "feedback (clip)" in server.ledger.withdrawn(["a"])["a"]
    (evidence,) = server.ledger.audit_rows(1, subject="release 2")[0].detail["guardrails"]
    assert evidence["guardrail"] == "feedback" and evidence["chance"] < ALPHA / 2
    assert await Guard(server, Rollout()).step() is None, "a rollback is never taken back"


async def test_answers_of_another_model_old_reports_and_a_guard_that_is_off_change_nothing(server: Server) -> None:
    report(server.ledger, 2, wrong=30, of=30, verdict="chosen")
    assert await Guard(server, Rollout()).step() is None
    await server.create(vlm="v")
    report(server.ledger, 3, wrong=30, of=30)  # of the CLIP, which release 3 does not change
    assert await Guard(server, Rollout()).step() is None
    await server.create(clip="b")
    report(server.ledger, 4, wrong=30, of=40)
    assert await Guard(server, Rollout(guard_seconds=0)).step() is None
    assert await Guard(server, Rollout()).step() is None, "all reports of release 3 are wrong, too"
    assert server.live[0] == 4
