"""A good client beside hostile ones, on a running server; and an end that lets what is in flight finish."""

from __future__ import annotations

import os
import signal
import threading
import time

import httpx
import pytest

from benchmarks.hostile import measure, plan
from tests.integration.serving.server_fixture import ServerFixture

pytestmark = pytest.mark.integration


def test_a_good_client_is_answered_beside_hostile_ones(server: ServerFixture) -> None:
    figures = measure(server.settings, plan(vlm=False, scale=0.2), seconds=2.0, rate=5.0)
    assert figures["good_failed"] == 0, figures
    assert figures["good_requests"] > 20
    assert all(row["answers"] for name, row in figures["attacks"].items() if name in ("picture_bombs", "health_flood"))
    assert figures["attacks"]["picture_bombs"]["answers"].keys() <= {"200", "429", "closed"}
    assert set(figures["attacks"]["health_flood"]["answers"]) == {"200", "429"}
    assert 0 < figures["rss_max_gib"] < 16


def test_a_silent_crowd_of_one_address_is_cut_off_at_its_bound(server: ServerFixture) -> None:
    silent = plan(vlm=False, scale=0.3)["silent"]  # 1,260 connections within 5 s, of which 512 may stay
    figures = measure(server.settings, {"silent": silent}, seconds=4.0, rate=5.0)
    assert figures["good_failed"] == 0, figures
    answers = figures["attacks"]["silent"]["answers"]
    assert answers.get("closed", 0) + answers.get("refused", 0) > 50


def test_what_is_in_flight_when_the_server_is_told_to_end_is_answered(server: ServerFixture) -> None:
    encoders = server.pids("ServeReplica:default:Encoder", "Encoder")
    assert encoders
    assert server.process is not None
    for pid in encoders:
        os.kill(pid, signal.SIGSTOP)
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(
            httpx.post(f"{server.url}/v1/embeddings", json={"input": ["last words"]}, timeout=60, trust_env=False)
        )

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        server.until(lambda: _in_flight(server) > 0)
        server.process.send_signal(signal.SIGTERM)
        server.until(lambda: _refuses(server))
    finally:
        for pid in encoders:
            os.kill(pid, signal.SIGCONT)
    asking.join(60)
    server.process.wait(60)
    assert [answer.status_code for answer in answers] == [200]


def _in_flight(server: ServerFixture) -> float:
    page = httpx.get(f"{server.url}/metrics", trust_env=False, timeout=20).text
    lines = [line for line in page.splitlines() if line.startswith("ratchet_release_in_flight_requests{")]
    time.sleep(0.1)
    return sum(float(line.split()[-1]) for line in lines)


def _refuses(server: ServerFixture) -> bool:
    """Whether a new request is refused. One that is admitted gets no answer within the time."""
    try:
        answer = httpx.post(f"{server.url}/v1/embeddings", json={"input": ["late"]}, timeout=3, trust_env=False)
    except httpx.TimeoutException:
        return False
    except httpx.TransportError:
        return True
    return answer.status_code == 503
