from __future__ import annotations

from pathlib import Path

import pytest

from core import metrics
from core.addresses import free_port
from ratchet_client import Client
from serving.engines.clip_base import ClipBase
from tests.unit.updater.builders import run
from updater.budget.throttle import GROWTH, POLL_SECONDS, WINDOW_SECONDS, Latencies, Throttle, Took, latencies

QUICK, SLOW = 0.02, 0.2


class CountedServer:
    """A server whose requests are counted by hand, and a clock that is set by hand."""

    def __init__(self) -> None:
        self.routes: dict[str, list[float]] = {}
        self.up = True
        self.now = 0.0
        self.throttle = Throttle(self.read, most_ratio=1.25, least=0.2, clock=lambda: self.now)

    def read(self) -> Latencies | None:
        if not self.up:
            return None
        return {route: Took(len(all_of), sum(all_of)) for route, all_of in self.routes.items()}

    def serve(self, seconds: float, count: int = 300, route: str = "/v1/embeddings") -> None:
        self.routes.setdefault(route, []).extend([seconds] * count)

    def watch(self) -> None:
        self.now += WINDOW_SECONDS
        self.throttle.watch()

    def ask(self, after: float = POLL_SECONDS) -> float:
        self.now += after
        return self.throttle()


def begun(seconds: float = QUICK) -> CountedServer:
    """After 300 requests that took this long, an update begins."""
    server = CountedServer()
    server.serve(seconds)
    server.throttle.begin()
    return server


def test_the_share_is_halved_while_requests_take_longer_than_before_and_grows_back_in_tenths() -> None:
    server, shares = begun(), []
    for seconds in [SLOW] * 4 + [QUICK] * 10:
        server.serve(seconds)
        shares.append(server.ask())
    assert shares == pytest.approx([0.5, 0.25, 0.2, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 1.0])


def test_serving_that_was_slow_before_the_update_is_not_the_trainers_fault() -> None:
    server = begun(SLOW)
    server.serve(SLOW)
    assert server.ask() == 1.0


def share_at_twice_the_quick_time(server: CountedServer) -> float:
    server.throttle.begin()
    server.serve(2 * QUICK)
    return server.ask()


def test_what_was_slow_long_before_the_update_does_not_hide_that_it_is_slow_now() -> None:
    server = CountedServer()
    server.serve(SLOW, count=3000)  # yesterday's rush
    for _ in range(15):
        server.watch()
        server.serve(QUICK)
    assert share_at_twice_the_quick_time(server) == 0.5


def test_only_the_minutes_before_an_update_are_kept_and_a_restarted_server_counts_anew() -> None:
    server = CountedServer()
    server.throttle.watch()
    server.serve(SLOW)
    for _ in range(11):
        server.watch()
    server.serve(QUICK, count=100)
    server.routes["/v1/embeddings"] = [QUICK] * 60  # it was restarted
    server.watch()
    server.serve(QUICK)
    assert share_at_twice_the_quick_time(server) == 0.5


def test_few_requests_in_those_minutes_leave_all_that_there_were_to_compare_with() -> None:
    server = CountedServer()
    server.serve(QUICK)
    server.throttle.watch()
    server.serve(SLOW, count=10)
    server.throttle.begin()
    server.serve(1.5 * QUICK, count=100)
    assert server.ask() == 1.0  # all of them took 26 ms on average
    server.serve(4 * QUICK, count=100)
    assert server.ask() == 0.5


def test_a_slow_route_is_compared_with_itself_and_not_with_a_quick_one() -> None:
    server = begun()
    server.serve(SLOW, route="/v1/chat/completions")  # was not asked before: nothing to compare it with
    server.serve(QUICK)
    assert server.ask() == 1.0
    server.throttle.begin()
    server.serve(0.4, route="/v1/chat/completions")
    server.serve(QUICK)
    assert server.ask() == 0.5


def test_a_quarter_of_slow_requests_is_slow_by_as_much_as_it_raises_the_mean() -> None:
    server = begun()
    server.serve(QUICK, count=75)
    server.serve(1.9 * QUICK, count=25)
    assert server.ask() == 1.0
    server.serve(QUICK, count=75)
    server.serve(2.1 * QUICK, count=25)
    assert server.ask() == 0.5


def test_a_handful_of_requests_says_nothing_and_after_a_while_nobody_is_there() -> None:
    server = begun()
    server.serve(SLOW)
    assert server.ask() == 0.5
    server.serve(SLOW, count=20)
    assert server.ask() == 0.5
    assert server.ask(WINDOW_SECONDS) == pytest.approx(0.5 + GROWTH)


def test_the_server_is_asked_now_and_then_only() -> None:
    server = begun()
    assert server.ask() == 1.0
    server.serve(SLOW)
    assert server.ask(POLL_SECONDS / 2) == 1.0
    assert server.ask(POLL_SECONDS / 2) == 0.5


def test_a_server_that_is_away_is_in_nobodys_way_and_one_that_restarts_counts_anew() -> None:
    server = begun()
    server.serve(SLOW)
    assert server.ask() == 0.5
    server.up = False
    assert server.ask() == 1.0
    server.up = True
    server.routes.clear()
    server.serve(SLOW, count=250)
    assert server.ask() == 1.0
    server.serve(SLOW, count=250)
    assert server.ask() == 1.0


def test_latencies_are_read_from_the_page_that_prometheus_scrapes() -> None:
    port = free_port()
    with Client(f"http://127.0.0.1:{port}") as client:
        assert latencies(client) is None
        metrics.listen("serve", port)
        before = latencies(client) or {}
        for took in (0.002, 0.03, 0.03, 9.0):
            metrics.http.request("/v1/throttled", 200, took)
            metrics.http.request("/health/ready", 200, took)
        found = latencies(client) or {}
    assert set(found) - set(before) == {"/v1/throttled"}
    assert found["/v1/throttled"] == pytest.approx((4, 9.062))


def test_a_trainer_that_gives_way_rests_between_steps_and_computes_the_same(
    base: ClipBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(base, tmp_path / "plain")
    rests: list[float] = []
    monkeypatch.setattr("updater.training.trainer.time.sleep", rests.append)
    polite = run(base, tmp_path / "polite", duty_cycle=lambda: 0.5)
    assert len(rests) > polite.steps  # after each step, and after each shard of what is computed once
    assert all(rest > 0 for rest in rests)
    assert polite.adapter == plain.adapter
