from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from core import metrics
from core.addresses import free_port
from ratchet_client import Client
from serving.engines.clip_base import ClipBase
from tests.unit.updater.builders import run
from updater.budget.throttle import GROWTH, POLL_SECONDS, WINDOW_SECONDS, Latencies, Throttle, Took, latencies

QUICK, SLOW = 0.02, 0.2
CHAT = "/v1/chat/completions"


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
    """After 300 requests that took this long, and as many of a slow route, an update begins."""
    server = CountedServer()
    server.serve(seconds)
    server.serve(SLOW, route="/v1/slow")
    server.throttle.begin()
    return server


def test_the_share_is_halved_while_requests_take_longer_than_before_and_grows_back_in_tenths() -> None:
    server, shares = begun(), []
    for seconds in [SLOW] * 4 + [QUICK] * 10:
        server.serve(seconds)
        shares.append(server.ask())
    assert shares == pytest.approx([0.5, 0.25, 0.2, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("before", "served", "share"),
    [
        pytest.param(SLOW, [(SLOW, 300)], 1.0, id="serving that was slow before is not the trainer's fault"),
        pytest.param(QUICK, [(QUICK, 75), (1.9 * QUICK, 25)], 1.0, id="a quarter of slow requests raises the mean"),
        pytest.param(QUICK, [(QUICK, 75), (2.1 * QUICK, 25)], 0.5, id="a quarter raises it above the ratio"),
        pytest.param(QUICK, [(SLOW, 49)], 1.0, id="a handful of requests says nothing"),
        pytest.param(QUICK, [(SLOW, 50)], 0.5, id="fifty are enough"),
        pytest.param(QUICK, [(SLOW, 300, CHAT), (QUICK, 300)], 1.0, id="a route is compared with itself"),
        pytest.param(QUICK, [(2 * SLOW, 300, "/v1/slow"), (QUICK, 300)], 0.5, id="a slow route is slower"),
    ],
)
def test_a_route_is_compared_with_its_mean_before(before: float, served: list[tuple[Any, ...]], share: float) -> None:
    server = begun(before)
    for requests in served:
        server.serve(*requests)
    assert server.ask() == share


def share_at_twice_the_quick_time(server: CountedServer) -> float:
    server.throttle.begin()
    server.serve(2 * QUICK)
    return server.ask()


def test_only_the_minutes_before_an_update_are_kept_and_a_restarted_server_counts_anew() -> None:
    rush, server = CountedServer(), CountedServer()
    rush.serve(SLOW, count=3000)  # yesterday's
    for _ in range(15):
        rush.watch()
        rush.serve(QUICK)
    assert share_at_twice_the_quick_time(rush) == 0.5
    server.throttle.watch()
    server.serve(SLOW)
    for _ in range(11):
        server.watch()
    server.serve(QUICK, count=100)
    server.routes["/v1/embeddings"] = [QUICK] * 60  # it was restarted
    server.watch()
    server.serve(QUICK)
    assert share_at_twice_the_quick_time(server) == 0.5


def test_the_next_update_is_compared_with_what_came_after_the_last_one_began() -> None:
    server = CountedServer()
    server.watch()
    server.serve(SLOW, count=3000)
    server.throttle.begin()
    server.watch()
    server.serve(QUICK)
    assert share_at_twice_the_quick_time(server) == 0.5


def test_the_server_is_asked_now_and_then_and_after_a_while_without_requests_nobody_is_there() -> None:
    server = begun()
    assert server.ask() == 1.0
    server.serve(SLOW)
    assert [server.ask(POLL_SECONDS / 2) for _ in range(2)] == [1.0, 0.5]
    server.serve(SLOW, count=20)
    assert server.ask() == 0.5
    assert server.ask(WINDOW_SECONDS) == pytest.approx(0.5 + GROWTH)


def test_a_server_that_is_away_is_in_nobodys_way_and_one_that_restarts_counts_anew() -> None:
    server = begun()
    server.serve(SLOW)
    assert server.ask() == 0.5
    server.up = False
    assert server.ask() == 1.0
    server.up = True
    server.routes.clear()
    for _ in range(2):
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


def test_a_trainer_that_rests_computes_the_same(
    base: ClipBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(base, tmp_path / "plain")
    rests: list[float] = []
    monkeypatch.setattr("updater.training.trainer.time.sleep", rests.append)
    polite = run(base, tmp_path / "polite", duty_cycle=lambda: 0.5)
    assert len(rests) > polite.steps  # after each step, and after each shard of what is computed once
    assert all(rest > 0 for rest in rests)
    assert polite.adapter == plain.adapter
