"""The trainer computes less while serving is slower than before, and only then."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops import metrics
from serving.client import Client
from tests.support.tiny import tiny_base
from tests.unit.updater.builders import run
from updater.throttle import GROWTH, POLL_SECONDS, WINDOW_SECONDS, Latencies, Throttle, latencies, quantile

BOUNDS = (0.01, 0.05, 0.1, 0.25, 0.5, float("inf"))
QUICK, SLOW = 0.02, 0.2


class House:
    """A server whose requests are counted by hand, and a clock that is set by hand."""

    def __init__(self) -> None:
        self.routes: dict[str, list[float]] = {}
        self.up = True
        self.now = 0.0
        self.throttle = Throttle(self.read, most_ratio=1.25, least=0.2, clock=lambda: self.now)

    def read(self) -> Latencies | None:
        if not self.up:
            return None
        return {
            route: {bound: float(sum(took <= bound for took in all_of)) for bound in BOUNDS}
            for route, all_of in self.routes.items()
        }

    def serve(self, seconds: float, count: int = 300, route: str = "/v1/embeddings") -> None:
        self.routes.setdefault(route, []).extend([seconds] * count)

    def ask(self, after: float = POLL_SECONDS) -> float:
        self.now += after
        return self.throttle()


def begun(route: str = "/v1/embeddings") -> House:
    house = House()
    house.serve(QUICK, route=route)
    house.throttle.begin()
    return house


def test_while_requests_take_longer_than_before_the_share_is_halved_down_to_the_least() -> None:
    house = begun()
    shares = []
    for _ in range(4):
        house.serve(SLOW)
        shares.append(house.ask())
    assert shares == [0.5, 0.25, 0.2, 0.2]


def test_when_serving_is_quick_again_the_share_grows_back_in_tenths() -> None:
    house = begun()
    house.serve(SLOW)
    assert house.ask() == 0.5
    shares = []
    for _ in range(7):
        house.serve(QUICK)
        shares.append(house.ask())
    assert shares == pytest.approx([0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 1.0])


def test_serving_that_was_slow_before_the_update_is_not_the_trainers_fault() -> None:
    house = House()
    house.serve(SLOW)
    house.throttle.begin()
    house.serve(SLOW)
    assert house.ask() == 1.0


def test_a_slow_route_is_compared_with_itself_and_not_with_a_quick_one() -> None:
    house = begun()
    house.serve(SLOW, route="/v1/chat/completions")  # was not asked before: nothing to compare it with
    house.serve(QUICK)
    assert house.ask() == 1.0
    house.throttle.begin()
    house.serve(0.4, route="/v1/chat/completions")
    house.serve(QUICK)
    assert house.ask() == 0.5


def test_a_handful_of_requests_says_nothing_and_after_a_while_nobody_is_there() -> None:
    house = begun()
    house.serve(SLOW)
    assert house.ask() == 0.5
    house.serve(SLOW, count=20)
    assert house.ask() == 0.5
    assert house.ask(WINDOW_SECONDS) == pytest.approx(0.5 + GROWTH)


def test_the_server_is_asked_now_and_then_only() -> None:
    house = begun()
    assert house.ask() == 1.0
    house.serve(SLOW)
    assert house.ask(POLL_SECONDS / 2) == 1.0
    assert house.ask(POLL_SECONDS / 2) == 0.5


def test_a_server_that_is_away_is_in_nobodys_way_and_one_that_restarts_counts_anew() -> None:
    house = begun()
    house.serve(SLOW)
    assert house.ask() == 0.5
    house.up = False
    assert house.ask() == 1.0
    house.up = True
    house.routes.clear()
    house.serve(SLOW, count=250)
    assert house.ask() == 1.0
    house.serve(SLOW, count=250)
    assert house.ask() == 1.0


@given(st.lists(st.floats(0.0, 0.49), min_size=1, max_size=60), st.sampled_from([0.5, 0.9, 0.99]))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(took: list[float], share: float) -> None:
    true = float(np.quantile(took, share, method="inverted_cdf"))
    found = quantile({bound: float(sum(each <= bound for each in took)) for bound in BOUNDS}, share)
    high = next(bound for bound in BOUNDS if true <= bound)
    low = max((bound for bound in BOUNDS if bound < high), default=0.0)
    assert low <= found <= high


def test_latencies_are_read_from_the_page_that_prometheus_scrapes() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}") as client:
        assert latencies(client) is None
        metrics.listen("serve", port)
        before = latencies(client) or {}
        for took in (0.002, 0.03, 0.03, 9.0):
            metrics.http.request("/v1/throttled", 200, took)
            metrics.http.request("/health/ready", 200, took)
        found = latencies(client) or {}
    assert set(found) - set(before) == {"/v1/throttled"}
    buckets = found["/v1/throttled"]
    assert list(buckets) == sorted(buckets)
    assert (buckets[0.001], buckets[0.0025], buckets[0.05], buckets[5.0], buckets[float("inf")]) == (0, 1, 3, 3, 4)


def test_a_trainer_that_gives_way_rests_between_steps_and_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(tmp_path)
    plain = run(base, tmp_path / "plain")
    rests: list[float] = []
    monkeypatch.setattr("updater.train.time.sleep", rests.append)
    polite = run(base, tmp_path / "polite", give_way=lambda: 0.5)
    assert len(rests) == 1 + polite.steps  # after the one chunk of teacher features, and after each step
    assert all(rest > 0 for rest in rests)
    assert polite.adapter == plain.adapter
