"""Plans and audits of the chaos runs: a server under faults, and a stream under faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving import chaos, chaos_plan
from benchmarks.serving.chaos_audit import Kill, Refusal, Rollback, StateReport, audit, totals
from benchmarks.serving.chaos_plan import STATES, states_of
from benchmarks.stream import chaos_audit
from benchmarks.stream.chaos_audit import Audit, OffsetWatch
from benchmarks.stream.chaos_records import Made
from benchmarks.stream.filling import sample_rows
from demo.load.probes import RequestKind
from demo.load.traffic import CheckedSample
from streams.store.rows import Position
from streams.store.sample_store import SampleStore


def sample(began: float, problem: str = "", kind: RequestKind = "embeddings", seconds: float = 1.0) -> CheckedSample:
    return CheckedSample(began, seconds, 0 if problem else 3, problem, "clip", kind, began)


def state(name: str, began: float, *kills: Kill) -> StateReport:
    return StateReport(name, began, began + 100, kills=list(kills))


def test_all_states_share_the_time_and_the_ledger_is_stopped_for_three_minutes_of_fifteen() -> None:
    phases = chaos_plan.plan(900, 0)
    assert {phase.state for phase in phases} == set(STATES)
    assert sum(phase.seconds for phase in phases) == pytest.approx(900, abs=2)
    assert {phase.state: phase.seconds for phase in phases}["ledger-stopped"] == 180
    assert phases == chaos_plan.plan(900, 0) != chaos_plan.plan(900, 1)
    assert all(chaos_plan.plan(60, seed)[-1].state == "second-server" for seed in range(20)), "it replaces the first"
    for alone in ("ledger-stopped", "home-full"):
        assert [phase.seconds for phase in chaos_plan.plan(30, 0, [alone])] == [30]
    assert states_of("home-full, ledger-killed") == ["ledger-killed", "home-full"]
    with pytest.raises(ValueError, match="no state nonsense; there are ledger-stopped"):
        states_of("home-full,nonsense")


def test_a_failed_request_counts_unless_it_was_on_a_process_that_was_killed() -> None:
    report = state("catalog-killed", 100, Kill("catalog", "preparing", 110.0, 110.1))
    requests = [
        sample(105, "503 away", "search", seconds=6.0),  # in flight when the catalog was killed
        sample(109.5, "503 away", "embeddings"),  # in flight, but not on the catalog
        sample(105, "503 away", "search", seconds=1.0),  # answered before
        sample(110.2, "503 away", "search"),  # sent after
        sample(112),
    ]
    audit([report], requests)
    assert (report.requests, report.failed, report.failed_on_killed, report.mixed) == (5, 3, 1, 0)
    assert report.evidence[0].startswith("embeddings sent 9.5 s after the state began: 503 away")


@pytest.mark.parametrize(("process", "excused"), [("ingress", 4), ("controller", 0), ("vlm", 1), ("encoder", 3)])
def test_a_killed_process_excuses_requests_that_need_it_but_no_mixed_answer(process: str, excused: int) -> None:
    report = state("killed", 100, Kill(process, "", 110.0, 110.1))
    kinds: tuple[RequestKind, ...] = ("embeddings", "classify", "search", "chat")
    audit([report], [*(sample(109.5, "503", kind) for kind in kinds), sample(109.5, "mixed")])
    assert (report.failed_on_killed, report.failed, report.mixed) == (excused, 4 - excused, 1)


def test_a_request_counts_for_the_state_in_which_it_was_sent_and_those_before_for_the_first() -> None:
    first, second = state("home-full", 100), state("commit-lost", 200)
    skipped = StateReport("clock-ahead", 150, 151, skipped="no library")
    audit([first, skipped, second], [sample(90), sample(199), sample(201)])
    assert [each.requests for each in (first, skipped, second)] == [2, 0, 1]
    assert totals([first, skipped, second])["states"][1] == {"state": "clock-ahead", "skipped": "no library"}


def test_the_slowest_rollback_and_refusal_of_all_states_are_told_and_what_is_wrong_is_named() -> None:
    first, second = state("home-full", 100), state("ledger-stopped", 200)
    audit([first], [sample(110)])
    first.rollbacks = [Rollback(0.9, True)]
    assert chaos.violations(totals([first])) == []
    first.rollbacks = [Rollback(0.2, True), Rollback(1.5, True, ("503: away",))]
    second.refusals = [Refusal(0.4, 503)]
    figures = totals([first, second])
    assert (figures["rollbacks"], figures["rollback_seconds_max"], figures["refusal_seconds_max"]) == (2, 1.5, 0.4)
    assert chaos.violations(figures) == ["rollback_seconds_max 1.5"]
    second.refusals.append(Refusal(15.0, 0))
    first.rollbacks = [Rollback(0.2, False)]
    wrong = chaos.violations(totals([first, second]))
    assert wrong == ["rollbacks_failed 1", "refusals_not_503 1", "refusal_seconds_max 15.0"]


BAD = Made("bad", b"", [])


def good(row: dict[str, Any]) -> Made:
    return Made("good", b"", [], row["id"])


def refused(offset: int) -> dict[str, Any]:
    return {"kind": "quarantine", "topic": "t", "partition": 0, "offset": offset, "reason": "empty"}


def judge(store: SampleStore, places: dict[int, Made], messages: tuple[int, ...]) -> Audit:
    made = {(0, offset): each for offset, each in places.items()}
    return chaos_audit.audit("t", made, store, [("t", 0, each) for each in messages])


def test_the_audit_finds_each_kind_of_fault_and_nothing_where_all_is_well(tmp_path: Path) -> None:
    rows = sample_rows("t", 0, 4)[0].to_pylist()
    whole, faulty = (SampleStore(str(tmp_path / name)) for name in ("whole", "faulty"))
    whole.put([*rows[:2], refused(2)], [Position("t", 0, 10)])
    assert judge(whole, {0: good(rows[0]), 1: good(rows[1]), 2: BAD}, (2,)) == Audit()
    again = {**rows[1], "offset": 5}
    faulty.put([rows[0], rows[0], rows[1], again, rows[2], refused(6), refused(7), refused(8)], [Position("t", 0, 10)])
    sent = {0: good(rows[0]), 1: good(rows[1]), 5: good(rows[1]), 9: good(rows[3]), 6: BAD, 7: BAD, 8: good(rows[3])}
    result = judge(faulty, sent, (6, 6, 8))
    assert result.lost == 2, "9 has no row, 7 is not in the topic"
    assert result.double == 4, "0 twice, its id twice, the id of 1 twice, a row at 2 that nobody produced"
    assert (result.quarantine_double, result.misjudged) == (1, 1)
    assert len(result.evidence) == 8


def test_a_position_that_goes_backwards_is_seen(tmp_path: Path) -> None:
    store = SampleStore(str(tmp_path))
    watch = OffsetWatch(store)
    for end in (10, 9):
        store.put([], [Position("t", 0, end)])
        watch._look()
    assert watch.backwards == 1
