"""An orderly end, and a start that needs its stores only for changes; then canaries, shadows and the guard on a real
server, under traffic with every answer checked.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from scipy.stats import binom

from core.ledger.rows import AuditRow
from demo.load.traffic import Traffic
from ratchet_client import ServerError
from serving.releases.residency import residency_path
from serving.releases.rollback import roll_back_offline
from tests.integration.serving.server_fixture import ServerFixture
from tests.support.inputs import pictures

ROLLOUT = {
    "mode": "canary", "share": 0.1, "observe_seconds": 1, "min_comparisons": 30, "guard_seconds": 60,
    "compare_share": 1.0,
}  # fmt: skip
GENTLE, BROKEN = 0.02, 8.0
"""Sizes of random changes to the tiny base: the first preserves which samples are near each other, the second does
not."""
KEYS = 600


def ask(server: ServerFixture, timeout: float = 60.0) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/embeddings", json={"input": "x"}, timeout=timeout, trust_env=False)


def test_an_orderly_end_answers_what_is_in_flight_and_a_start_without_stores_serves_the_same_release(
    server: ServerFixture,
) -> None:
    first, second = server.adapter(), server.adapter()
    with server.client() as client:
        client.release(first, reason="one")
        client.release(second, reason="two")
    copy = residency_path(server.settings.home)
    server.until(lambda: copy.is_file() and second in copy.read_text())
    end_with_requests_in_flight(server)

    # Ledger and artifacts away: a start serves the last known release from the node's copies.
    artifacts = Path(server.settings.artifacts)
    artifacts.rename(artifacts.with_suffix(".away"))
    server.move_ledger("down")
    server.configure(rollout=ROLLOUT, serve={"vlm_engine": "transformers"})  # for later tests; starts in few seconds
    server.start()
    answer = ask(server)
    assert (answer.status_code, answer.headers["x-ratchet-adapter"]) == (200, second)
    assert 'source="file"' in httpx.get(f"{server.url}/metrics", timeout=60).text
    shutil.rmtree(artifacts, ignore_errors=True)
    artifacts.with_suffix(".away").rename(artifacts)
    server.move_ledger("up")

    # A rollback without the server is adopted by it, everywhere.
    row = roll_back_offline(server.ledger, ["clip"], to=None, actor="t", reason="offline")
    server.until(lambda: ask(server).headers["x-ratchet-release"] == str(row.number))
    assert ask(server).headers["x-ratchet-adapter"] == row.clip == first


def end_with_requests_in_flight(server: ServerFixture) -> None:
    """SIGTERM while four requests are stalled: they are answered later, and new ones are refused at once."""
    assert server.process is not None
    with ThreadPoolExecutor(4) as pool:
        with server.stopped_encoders():
            requests = [pool.submit(ask, server) for _ in range(4)]
            server.until(lambda: server.requests_in_flight() >= len(requests))
            server.process.send_signal(signal.SIGTERM)
            server.until(lambda: refuses(server))
        assert [request.result().status_code for request in requests] == [200] * len(requests)
    server.process.wait(60)


def refuses(server: ServerFixture) -> bool:
    """Whether a new request is refused. An admitted request gets no answer within the timeout."""
    try:
        return ask(server, timeout=3.0).status_code == 503
    except httpx.TimeoutException:
        return False
    except httpx.TransportError:
        return True


@pytest.fixture(scope="module")
def guarded(shared_server: ServerFixture) -> ServerFixture:
    """The shared server with a guard, as the test of its end started it; the base is live."""
    if shared_server.settings.rollout.mode != ROLLOUT["mode"]:
        shared_server.stop()
        shared_server.configure(rollout=ROLLOUT)
    shared_server.ensure_running()
    with shared_server.client() as client:
        shared_server.until(client.is_ready)
        if client.live() > 1:
            client.rollback("trials begin with the base", to=1)
    return shared_server


@pytest.fixture
def traffic(guarded: ServerFixture) -> Traffic:
    """Many different inputs: repeated inputs tell the guard nothing new."""
    texts = [
        f"{colour} {thing} {count}" for colour in ("red", "blue") for thing in ("ball", "map") for count in range(9)
    ]
    return Traffic(guarded.url, images=pictures(36), texts=texts, settings=guarded.settings, rate=25)


def checked_releases(traffic: Traffic) -> set[int]:
    """Stop a load that must not have failed nor mixed, and return the releases that answered."""
    traffic.stop()
    report = traffic.report()
    assert (report.failed, report.mixed) == (0, 0), report.problems
    return set(report.releases)


def audited(server: ServerFixture, actor: str, action: str) -> AuditRow:
    return next(row for row in server.ledger.audit_rows(200) if (row.actor, row.action) == (actor, action))


def answered_by(server: ServerFixture, keys: range, **body: Any) -> list[int]:
    """The releases that answer these keys."""
    with httpx.Client(base_url=server.url, trust_env=False) as http:
        answers = [
            http.post("/v1/embeddings", json={"input": "?", **body}, headers={"x-ratchet-key": f"key-{key}"})
            for key in keys
        ]
    assert {answer.status_code for answer in answers} == {200}
    return [int(answer.headers["x-ratchet-release"]) for answer in answers]


def rollout(server: ServerFixture) -> dict[str, Any]:
    """The guard's status; empty while the controller is being replaced."""
    try:
        with server.client() as client:
            found: dict[str, Any] = client.status()["controller"]["rollout"]
            return found
    except ServerError:
        return {}


def compared(server: ServerFixture, release: int) -> int:
    """Number of images and texts on which the guard compared a release; 0 until its first interim analysis."""
    watched = rollout(server)
    return int(watched["compared"].get("clip", {}).get("inputs", 0)) if watched.get("release") == release else 0


def test_a_bad_release_forced_past_the_gate_is_taken_back_under_traffic(
    guarded: ServerFixture, traffic: Traffic
) -> None:
    bad = guarded.adapter(scale=BROKEN, passed=False)
    with guarded.client(actor="ann") as client, traffic:
        traffic.wait_for(30)
        with pytest.raises(ServerError, match=f"{bad} has no passed verdict .*--force") as caught:
            client.release(bad, reason="I am sure")
        assert caught.value.status == 422
        before = client.live()
        number = client.release(bad, reason="I am sure", force=True)["number"]
        guarded.until(lambda: client.live() > number)
        guarded.until(lambda: number + 1 in traffic.releases())
        assert client.live() == number + 1
        with pytest.raises(ServerError, match=f"{bad} was withdrawn: agreement"):
            client.release(bad, reason="again")
        metrics = client._http.get("/metrics").text
    assert {before, number, number + 1} <= checked_releases(traffic)
    live = guarded.ledger.live()
    assert live is not None
    assert (live.actor, live.clip, live.share) == ("guard", guarded.ledger.release(before).clip, 1.0)
    assert f"agreement (clip) of release {number} is out of bounds" in live.reason
    why = audited(guarded, "guard", "withdraw")
    assert why.subject == f"release {number}"
    (agreement,) = [row for row in why.detail["guardrails"] if row["guardrail"] == "agreement"]
    assert agreement["broken"] and agreement["chance"] < agreement["level"]
    assert why.detail["compared"]["clip"]["inputs"] == agreement["of"]
    assert audited(guarded, "ann", "release").detail["forced"] is True
    assert 'ratchet_guard_decisions_total{decision="rolled_back",guardrail="agreement"}' in metrics
    assert 'ratchet_rollout_comparisons_total{family="clip",outcome="differ"}' in metrics


def test_a_canary_answers_its_share_by_key_also_while_the_controller_is_killed_until_it_is_promoted(
    guarded: ServerFixture,
) -> None:
    with guarded.client() as client:
        stable = client.live()
        made = client.release(guarded.adapter(scale=GENTLE), reason="a tenth first", share=0.1)
        canary = made["number"]
        assert made["share"] == 0.1
        sides = answered_by(guarded, range(KEYS))
        assert set(sides) == {stable, canary}
        assert binom.ppf(0.0001, KEYS, 0.1) <= sides.count(canary) <= binom.ppf(0.9999, KEYS, 0.1)
        inside = sides.index(canary)
        one = range(inside, inside + 1)
        assert answered_by(guarded, one, model=f"clip@{stable}") == [stable]
        assert answered_by(guarded, range(1), model=f"clip@{canary}") == [canary]
        listed = client.releases(5)
        assert (listed["live"], listed["stable"], listed["data"][0]["share"]) == (canary, stable, 0.1)

        (controller,) = guarded.pids("ServeReplica:ratchet:Controller")
        os.kill(controller, signal.SIGKILL)
        assert answered_by(guarded, range(60)) == sides[:60]
        guarded.until(lambda: guarded.pids("ServeReplica:ratchet:Controller") not in ([], [controller]))
        guarded.until(lambda: rollout(guarded).get("state") == "canary")
        assert (rollout(guarded)["release"], rollout(guarded)["share"]) == (canary, 0.1)
        promoted = client.promote("well behaved", expected_live=canary)
        assert (promoted["number"], promoted["share"], promoted["kind"]) == (canary + 1, 1.0, "promotion")
        assert set(answered_by(guarded, range(60))) == {promoted["number"]}
        with pytest.raises(ServerError, match="nothing can be promoted"):
            client.promote("again")


def test_a_shadow_answers_nobody_and_is_compared(guarded: ServerFixture, traffic: Traffic) -> None:
    with guarded.client() as client, traffic:
        stable = client.live()
        shadow = client.release(guarded.adapter(scale=GENTLE), reason="only look", share=0)["number"]
        guarded.until(lambda: compared(guarded, shadow) >= 12)
        assert rollout(guarded)["state"] == "shadow"
        back = client.rollback(reason="seen enough")
        guarded.until(lambda: back["number"] in traffic.releases())
    answered = checked_releases(traffic)
    assert shadow not in answered and {stable, back["number"]} <= answered
    assert (back["clip"], back["number"]) == (guarded.ledger.release(stable).clip, shadow + 1)


def test_an_update_is_a_canary_first_and_promoted_when_it_was_watched_enough(
    guarded: ServerFixture, traffic: Traffic
) -> None:
    name = guarded.adapter(scale=GENTLE)
    with guarded.client() as client, traffic:
        before = client.live()
        guarded.propose_update(name)
        guarded.until(lambda: client.live() > before)
        assert guarded.ledger.release(before + 1).share == 0.1
        client.hold("while I look")
        guarded.until(lambda: compared(guarded, before + 1) >= 30)
        time.sleep(2.5)  # two looks of the guard
        assert client.live() == before + 1
        client.resume("looks good")
        guarded.until(lambda: client.live() > before + 1)
    checked_releases(traffic)
    live = guarded.ledger.live()
    assert live is not None
    assert (live.clip, live.share, live.actor) == (name, 1.0, "guard")
    assert "stayed within bounds" in live.reason
    assert audited(guarded, "guard", "promote").detail["promoted"] == before + 1


@pytest.mark.long
def test_a_live_adapter_that_is_gone_is_taken_back_by_itself(server: ServerFixture) -> None:
    before = server.ledger.live()
    gone = server.adapter()
    with server.client() as client:
        client.release(gone, reason="will be lost")
    server.stop()
    shutil.rmtree(Path(server.settings.artifacts) / "adapters" / gone)
    shutil.rmtree(server.settings.home / "serving/adapters" / gone)
    server.start()
    assert before is not None and ask(server).headers["x-ratchet-adapter"] == before.clip
    server.until(lambda: (row := server.ledger.live()) is not None and row.actor == "ratchet")
    live = server.ledger.live()
    assert live is not None and live.clip == before.clip and f"{gone} cannot be loaded" in live.reason
    server.until(lambda: ask(server).headers["x-ratchet-release"] == str(live.number))
