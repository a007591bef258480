"""Releases under load and under faults: no request fails, and none is answered by two models."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core.errors import ConfigError
from ratchet_client import Conflict
from serving.app import start
from serving.ray.ray_session import session_directory
from tests.integration.serving.server_fixture import ROOT, ServerFixture

pytestmark = pytest.mark.integration


def test_releases_a_rollback_and_a_killed_encoder_under_load_fail_and_mix_nothing(server: ServerFixture) -> None:
    names = [server.adapter() for _ in range(4)]
    with server.client() as client, server.traffic(rate=40) as traffic, ThreadPoolExecutor(1) as pool:
        made = []
        for name in names[:3]:
            made.append(client.release(name, reason="swap"))
            server.until(lambda: made[-1]["number"] in traffic.releases())
        held = {row["clip"] for row in client.releases()["data"] if row["resident"]}
        back = client.rollback(reason="back")
        assert back["clip"] == names[1]
        assert back["clip"] in held  # nothing has to be loaded for it, so it is immediate
        server.until(lambda: back["number"] in traffic.releases())

        releasing = pool.submit(lambda: [client.release(name, reason="under fire") for name in names])
        with server.client() as other:
            server.until(lambda: other.live() > back["number"])
        encoders = server.pids("ServeReplica:ratchet:Encoder")
        assert len(encoders) == 2
        os.kill(encoders[0], signal.SIGKILL)
        last = releasing.result(timeout=120)[-1]
        server.until(lambda: last["number"] in traffic.releases())
    report = traffic.report()
    assert (report.failed, report.mixed) == (0, 0), report.problems
    assert server.ledger.live().number == last["number"]  # type: ignore[union-attr]
    server.until(lambda: len(server.pids("ServeReplica:ratchet:Encoder")) == 2)


def test_a_release_answers_when_every_replica_serves_it_and_its_request_is_in_the_log_of_the_controller(
    server: ServerFixture,
) -> None:
    body, headers = {"clip": server.adapter(), "reason": "to be found"}, {"x-request-id": "find-me:17"}
    with server.client() as client:
        answer = client._http.post("/admin/v1/releases", json=body, headers=headers)
        others = [
            client._http.post("/v1/embeddings", json={"input": "x"}, headers={"x-request-id": "not sane"})
            for _ in range(40)
        ]
    assert {other.headers["x-ratchet-release"] for other in others} == {str(answer.json()["number"])}
    assert answer.json()["acknowledged"] >= 3  # one ingress, two encoders
    assert answer.headers.get_list("x-request-id") == ["find-me:17"]
    (made_for_it,) = others[0].headers.get_list("x-request-id")
    assert made_for_it != "not sane"
    lines = lambda: [each for each in server.records() if each.get("request_id") == "find-me:17"]  # noqa: E731
    server.until(lines)
    assert {(each["role"], each["level"]) for each in lines()} == {("controller", "INFO")}
    assert all(each["replica"] for each in lines())


def test_a_rollback_waits_for_no_stopped_encoder_and_no_preparation(server: ServerFixture) -> None:
    names = [server.adapter() for _ in range(2)]
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        client.release(names[0], reason="to be taken back")
        with server.stopped_encoders():
            slow = pool.submit(client.release, names[1], reason="never prepared")
            server.until(
                lambda: (
                    [(row.clip, row.state) for row in server.ledger.pending_proposals()] == [(names[1], "preparing")]
                )
            )
            began = time.monotonic()
            with server.client() as operator:
                back = operator.rollback(reason="at once")
            seconds = time.monotonic() - began
        with pytest.raises(Conflict, match="rolled back while it was being prepared"):
            slow.result(timeout=60)
        server.until(lambda: client.live() == back["number"])
    assert back["commit_seconds"] + back["prepare_seconds"] < 5, back  # alone 0.6 s, and a preparation waits for 300
    assert seconds < 10


ROLL = """
import sys
from pathlib import Path
import ray
from core.loading import load_settings
from serving.app import build
from serving.ray.replica_process import NODE
from serving.releases.broadcast import APP
ray.init(address=sys.argv[3], _temp_dir=sys.argv[2], _node_ip_address=NODE, log_to_driver=False)
from ray import serve
serve.run(build(load_settings(Path(sys.argv[1]))), name=APP, route_prefix="/")
"""
"""Like ``kubectl apply`` of a RayService with new code: each deployment is replaced, replica by replica."""


@pytest.mark.long
def test_new_code_of_every_deployment_is_rolled_out_and_fails_no_request(server: ServerFixture) -> None:
    deployments = ("Encoder", "Ingress", "Catalog", "Controller")
    old = {name: set(server.pids(f"ServeReplica:ratchet:{name}")) for name in deployments}
    assert all(old.values())
    inherited = Path(f"/proc/{min(old['Controller'])}/environ").read_bytes().decode().split("\0")
    environ = dict(line.split("=", 1) for line in inherited if "=" in line and not line.startswith("RAY_JOB"))
    [raylet] = server.pids("raylet/raylet")
    words = Path(f"/proc/{raylet}/cmdline").read_text().split("\0")
    # "auto" would be any Ray of this machine.
    [address] = [word.partition("=")[2] for word in words if re.match("--gcs[-_]address=", word)]
    command = [sys.executable, "-c", ROLL, str(server.config), str(session_directory(server.settings) / "ray"), address]
    # Callers that wait: where replicas begin on a busy machine, a rate would pile up more than a caller may have open.
    with server.traffic(concurrency=4) as traffic:
        traffic.wait_for(40)
        subprocess.run(command, check=True, env={**environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, timeout=240)
        traffic.wait_for(40)
    report = traffic.report()
    assert (report.failed, report.mixed) == (0, 0), report.problems
    for name in deployments:
        assert not old[name] & set(server.pids(f"ServeReplica:ratchet:{name}")), name
    with server.client() as client:
        assert client.release(server.adapter(), reason="the new controller works")["number"] == client.live()


def test_a_home_is_served_once(server: ServerFixture) -> None:
    with pytest.raises(ConfigError, match="serves this home already"):
        start(server.settings)
    with server.client() as client:
        assert client.is_ready()
