"""Canaries, shadows and the guard on a real server, under traffic with every answer checked."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from typing import Any

import httpx
import pytest
from scipy.stats import binom

from core.ledger.rows import AuditRow
from demo.load.traffic import Traffic
from ratchet_client import ServerError
from tests.integration.serving.conftest import ROLLOUT
from tests.integration.serving.server_fixture import ServerFixture
from tests.support.inputs import pictures

pytestmark = pytest.mark.integration
GENTLE, BROKEN = 0.02, 8.0
"""Sizes of random changes to the tiny base: the first preserves which samples are near each other, the second does
not."""
KEYS = 600


@pytest.fixture(scope="module")
def server(shared_server: ServerFixture) -> ServerFixture:
    """The shared server with a guard, as an earlier module started it; the base is live."""
    if shared_server.settings.rollout.mode != ROLLOUT["mode"]:
        shared_server.stop()
        shared_server.configure(rollout=ROLLOUT)
    shared_server.ensure_running()
    with shared_server.client() as client:
        if client.live() > 1:
            client.rollback("trials begin with the base", to=1)
    return shared_server


@pytest.fixture
def traffic(server: ServerFixture) -> Traffic:
    """Many different inputs: repeated inputs tell the guard nothing new."""
    texts = [
        f"{colour} {thing} {count}" for colour in ("red", "blue") for thing in ("ball", "map") for count in range(9)
    ]
    return Traffic(server.url, images=pictures(36), texts=texts, settings=server.settings, rate=25)


def audited(server: ServerFixture, actor: str, action: str) -> AuditRow:
    return next(row for row in server.ledger.audit_rows(200) if (row.actor, row.action) == (actor, action))


def answered_by(server: ServerFixture, http: httpx.Client, key: str, **body: Any) -> int:
    answer = http.post("/v1/embeddings", json={"input": "who answers?", **body}, headers={"x-ratchet-key": key})
    assert answer.status_code == 200, answer.text
    return int(answer.headers["x-ratchet-release"])


def test_a_bad_release_forced_past_the_gate_is_taken_back_under_traffic(
    server: ServerFixture, traffic: Traffic
) -> None:
    bad = server.adapter(scale=BROKEN, passed=False)
    with server.client(actor="ann") as client, traffic:
        traffic.wait_for(30)
        with pytest.raises(ServerError, match=f"{bad} has no passed verdict .*--force") as caught:
            client.release(bad, reason="I am sure")
        assert caught.value.status == 422
        before = client.live()
        number = client.release(bad, reason="I am sure", force=True)["number"]
        server.until(lambda: client.live() > number)
        traffic.wait_for(120)
        assert client.live() == number + 1
        with pytest.raises(ServerError, match=f"{bad} was withdrawn: agreement"):
            client.release(bad, reason="again")
        metrics = client._http.get("/metrics").text
    traffic.stop()
    report = traffic.report()
    assert (report.failed, report.mixed) == (0, 0), report.problems
    live = server.ledger.live()
    assert live is not None
    assert (live.actor, live.clip, live.share) == ("guard", server.ledger.release(before).clip, 1.0)
    assert f"agreement (clip) of release {number} is out of bounds" in live.reason
    why = audited(server, "guard", "withdraw")
    assert why.subject == f"release {number}"
    (agreement,) = [row for row in why.detail["guardrails"] if row["guardrail"] == "agreement"]
    assert agreement["broken"]
    assert agreement["chance"] < agreement["level"]
    assert why.detail["compared"]["clip"]["inputs"] == agreement["of"]
    assert audited(server, "ann", "release").detail["forced"] is True
    assert 'ratchet_guard_decisions_total{decision="rolled_back",guardrail="agreement"}' in metrics
    assert 'ratchet_rollout_comparisons_total{family="clip",outcome="differ"}' in metrics


def test_a_canary_answers_its_share_and_one_key_sees_one_side(server: ServerFixture) -> None:
    with server.client() as client, httpx.Client(base_url=server.url, trust_env=False) as http:
        stable = client.live()
        made = client.release(server.adapter(scale=GENTLE), reason="a tenth first", share=0.1)
        canary = made["number"]
        assert made["share"] == 0.1
        sides = {f"key-{index}": answered_by(server, http, f"key-{index}") for index in range(KEYS)}
        count = Counter(sides.values())
        assert set(count) == {stable, canary}
        assert binom.ppf(0.0001, KEYS, 0.1) <= count[canary] <= binom.ppf(0.9999, KEYS, 0.1)
        again = {key: answered_by(server, http, key) for key in list(sides)[:200]}
        assert again == {key: sides[key] for key in again}
        inside = next(key for key, side in sides.items() if side == canary)
        assert answered_by(server, http, "", user=inside) == canary  # the body's `user` is a key too
        assert answered_by(server, http, inside, model=f"clip@{stable}") == stable
        assert answered_by(server, http, "key-0", model=f"clip@{canary}") == canary
        listed = client.releases(5)
        assert (listed["live"], listed["stable"], listed["data"][0]["share"]) == (canary, stable, 0.1)


def test_a_controller_killed_during_a_canary_goes_on_and_its_promotion_is_one_commit(server: ServerFixture) -> None:
    with server.client() as client, httpx.Client(base_url=server.url, trust_env=False) as http:
        canary = client.live()
        sides = {f"key-{index}": answered_by(server, http, f"key-{index}") for index in range(60)}
        (controller,) = server.pids("ServeReplica:ratchet:Controller")
        os.kill(controller, signal.SIGKILL)
        assert {key: answered_by(server, http, key) for key in sides} == sides
        server.until(lambda: server.pids("ServeReplica:ratchet:Controller") not in ([], [controller]))
        server.until(lambda: rollout(server).get("state") == "canary")
        assert (rollout(server)["release"], rollout(server)["share"]) == (canary, 0.1)
        promoted = client.promote("well behaved", expected_live=canary)
        assert (promoted["number"], promoted["share"], promoted["kind"]) == (canary + 1, 1.0, "promotion")
        assert {answered_by(server, http, key) for key in sides} == {promoted["number"]}
        with pytest.raises(ServerError, match="nothing can be promoted"):
            client.promote("again")


def test_a_shadow_answers_nobody_and_is_compared(server: ServerFixture, traffic: Traffic) -> None:
    with server.client() as client, traffic:
        stable = client.live()
        shadow = client.release(server.adapter(scale=GENTLE), reason="only look", share=0)["number"]
        traffic.wait_for(20)
        seen = len(traffic._rows())
        server.until(lambda: compared(server, shadow) >= 12)
        assert rollout(server)["state"] == "shadow"
        back = client.rollback(reason="seen enough")
        traffic.wait_for(seen + 20)
    traffic.stop()
    report = traffic.report()
    assert (report.failed, report.mixed) == (0, 0), report.problems
    assert shadow not in report.releases
    assert (back["clip"], back["number"]) == (server.ledger.release(stable).clip, shadow + 1)


def test_an_update_is_a_canary_first_and_promoted_when_it_was_watched_enough(
    server: ServerFixture, traffic: Traffic
) -> None:
    name = server.adapter(scale=GENTLE)
    with server.client() as client, traffic:
        before = client.live()
        server.propose_update(name)
        server.until(lambda: client.live() > before)
        assert server.ledger.release(before + 1).share == 0.1
        client.hold("while I look")
        server.until(lambda: compared(server, before + 1) >= 30)
        time.sleep(2.5)  # two looks of the guard
        assert client.live() == before + 1
        client.resume("looks good")
        server.until(lambda: client.live() > before + 1)
    traffic.stop()
    report = traffic.report()
    assert (report.failed, report.mixed) == (0, 0), report.problems
    live = server.ledger.live()
    assert live is not None
    assert (live.clip, live.share, live.actor) == (name, 1.0, "guard")
    assert "stayed within bounds" in live.reason
    assert audited(server, "guard", "promote").detail["promoted"] == before + 1


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
