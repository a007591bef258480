from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.serving.chaos import violations
from benchmarks.serving.chaos_audit import Kill, Refusal, Rollback, StateReport, audit, totals
from benchmarks.serving.chaos_plan import STATES, plan, states_of
from benchmarks.serving.chaos_states import faketime_library
from core.addresses import free_port
from demo.load.probes import RequestKind
from demo.load.traffic import CheckedSample
from tests.support.tcp_relay import TcpRelay


def sample(began: float, problem: str = "", kind: RequestKind = "embeddings", seconds: float = 1.0) -> CheckedSample:
    return CheckedSample(began, seconds, 0 if problem else 3, problem, "clip", kind, began)


def state(name: str, began: float, *kills: Kill) -> StateReport:
    return StateReport(name, began, began + 100, kills=list(kills))


def test_all_states_share_the_time_and_the_ledger_is_stopped_for_three_minutes_of_fifteen() -> None:
    phases = plan(900, 0)
    assert {phase.state for phase in phases} == set(STATES)
    assert sum(phase.seconds for phase in phases) == pytest.approx(900, abs=2)
    assert {phase.state: phase.seconds for phase in phases}["ledger-stopped"] == 180
    assert phases == plan(900, 0) != plan(900, 1)
    assert all(plan(60, seed)[-1].state == "second-server" for seed in range(20)), "it replaces the first"
    assert [phase.seconds for phase in plan(30, 0, ["ledger-stopped"])] == [30]
    assert [phase.seconds for phase in plan(30, 0, ["home-full"])] == [30]


def test_states_are_named_with_commas_and_a_wrong_name_is_told() -> None:
    assert states_of("") == list(STATES)
    assert states_of("home-full, ledger-killed") == ["ledger-killed", "home-full"]
    with pytest.raises(ValueError, match="no state nonsense; there are ledger-stopped"):
        states_of("home-full,nonsense")


def test_a_failed_request_counts_unless_it_was_on_a_process_that_was_killed() -> None:
    kill = Kill("catalog", "preparing", 110.0, 110.1)
    report = state("catalog-killed", 100, kill)
    audit(
        [report],
        [
            sample(105, "503 away", "search", seconds=6.0),  # in flight when the catalog was killed
            sample(109.5, "503 away", "embeddings"),  # in flight, but not on the catalog
            sample(105, "503 away", "search", seconds=1.0),  # answered before
            sample(110.2, "503 away", "search"),  # sent after
            sample(112),
        ],
    )
    assert (report.requests, report.failed, report.failed_on_killed, report.mixed) == (5, 3, 1, 0)
    assert report.evidence[0].startswith("embeddings sent 9.5 s after the state began: 503 away")


def test_every_kind_of_request_is_on_the_ingress_and_none_on_the_controller() -> None:
    kinds: tuple[RequestKind, ...] = ("embeddings", "classify", "search", "chat")
    for process, excused in (("ingress", 4), ("controller", 0), ("vlm", 1), ("encoder", 3)):
        report = state("killed", 100, Kill(process, "", 110.0, 110.1))
        audit([report], [sample(109.5, "503", kind) for kind in kinds])
        assert (process, report.failed_on_killed) == (process, excused)


def test_a_mixed_answer_counts_even_on_a_killed_process() -> None:
    report = state("encoder-killed", 100, Kill("encoder", "", 110.0, 110.1))
    audit([report], [sample(109.5, "mixed")])
    assert (report.mixed, report.failed, report.failed_on_killed) == (1, 0, 0)


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
    assert violations(totals([first])) == []
    first.rollbacks = [Rollback(0.2, True), Rollback(1.5, True, ("503: away",))]
    second.refusals = [Refusal(0.4, 503)]
    figures = totals([first, second])
    assert (figures["rollbacks"], figures["rollback_seconds_max"], figures["refusal_seconds_max"]) == (2, 1.5, 0.4)
    assert violations(figures) == ["rollback_seconds_max 1.5"]
    second.refusals.append(Refusal(15.0, 0))
    first.rollbacks = [Rollback(0.2, False)]
    wrong = violations(totals([first, second]))
    assert wrong == ["rollbacks_failed 1", "refusals_not_503 1", "refusal_seconds_max 15.0"]


@pytest.fixture
def echo() -> Iterator[int]:
    """An echo server; returns its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                link, _ = listener.accept()
            except OSError:
                return
            with link:
                link.sendall(link.recv(100))

    threading.Thread(target=serve, daemon=True).start()
    yield int(listener.getsockname()[1])
    listener.close()


def exchange(port: int) -> float:
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), 5) as link:
        link.sendall(b"x")
        assert link.recv(1) == b"x"
    return time.monotonic() - began


def test_a_relay_delays_each_direction_while_it_is_told_to(echo: int) -> None:
    relay = TcpRelay(free_port(), f"127.0.0.1:{echo}")
    relay.open()
    exchange(relay.port)
    relay.delay_seconds = 0.1
    assert exchange(relay.port) >= 0.2
    relay.cut()
    with pytest.raises(OSError):
        exchange(relay.port)


def test_the_clock_of_a_process_can_be_set_ahead() -> None:
    library = faketime_library()
    assert library is not None and isinstance(library, Path) and library.is_file()
