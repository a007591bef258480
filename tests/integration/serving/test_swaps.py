"""Releases of a CLIP and a VLM under load and under faults: no request fails, and none is answered by two models. Then
engines that die, and clients that disconnect.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks import traces
from benchmarks.otlp_collector import OtlpCollector
from core.artifacts import Artifacts
from core.errors import ConfigError
from ratchet_client import Conflict, ServerError, data_uri, last_spaces
from serving.app import start
from serving.ray.ray_session import end_leftovers, session_directory
from tests.integration.serving.server_fixture import ROOT, TEXTS, ServerFixture
from tests.support.tiny_vlm import tiny_vlm_adapter, tiny_vlm_base

pytestmark = pytest.mark.timeout(400)


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


@pytest.mark.parametrize("releases", [4, pytest.param(100, marks=[pytest.mark.long, pytest.mark.timeout(2400)])])
def test_a_pinned_space_is_answered_by_it_or_refused_while_releases_go_by(server: ServerFixture, releases: int) -> None:
    """Callers keep the space of their vectors and pin it until it is gone; the engine's own vectors are expected."""
    names = [server.adapter() for _ in range(3)]
    known = {server.ledger.adapter(name).image_space: server.expected(name, texts=TEXTS[:1])[0] for name in names}
    answered, gone, over = [0, 0], [0, 0], threading.Event()

    def ask(caller: int) -> None:
        with server.client() as client:
            while not over.is_set():
                client.embed(TEXTS[:1])
                space, _ = last_spaces()
                try:
                    while not over.is_set():
                        [vector] = client.embed(TEXTS[:1], space=space)
                        assert last_spaces()[0] == space
                        if space in known:  # not what was live before
                            assert np.abs(np.asarray(vector) - known[space]).max() < 1e-3
                        answered[caller] += 1
                except Conflict as error:
                    assert error.code == "space_gone", error
                    gone[caller] += 1

    def more_of_each(counts: list[int]) -> Callable[[], bool]:
        before = counts.copy()
        return lambda: all(now > then for now, then in zip(counts, before, strict=True))

    with ThreadPoolExecutor(2) as pool, server.client() as client:
        asking = [pool.submit(ask, caller) for caller in (0, 1)]
        try:
            server.until(more_of_each(answered))
            for number in range(0, releases, 2):
                both_gone = more_of_each(gone)
                client.release(names[number % len(names)], reason="swap")
                server.until(more_of_each(answered))
                client.release(names[(number + 1) % len(names)], reason="swap")
                server.until(both_gone)  # two releases are in memory
                server.until(more_of_each(answered))  # both have pinned what is live
        finally:
            over.set()
        for each in asking:
            each.result()


def replica(server: ServerFixture) -> dict[str, Any]:
    with server.client() as client:
        found: dict[str, Any] = client.status()["controller"]["vlm"][0]
        return found


def test_swaps_and_rollbacks_under_mixed_load_fail_and_mix_nothing(server: ServerFixture) -> None:
    names = [server.vlm_adapter() for _ in range(4)]
    clip = server.adapter()
    with server.client() as client, server.traffic(rate=12, questions=True) as traffic:
        traffic.wait_for(12)
        made = []
        for count, name in enumerate([*names, *names[:2]]):
            made.append(client.release(vlm=name, reason="swap"))
            server.until(lambda: made[-1]["number"] in traffic.releases())
            if count == 2:
                other = client.release(clip, reason="CLIP in between")
                assert (other["clip"], other["vlm"], other["family"]) == (clip, name, "clip")
            if count % 3 == 2:
                held = replica(server)["resident"]
                made.append(client.rollback("back", family="vlm"))
                assert made[-1]["vlm"] == names[count % 4 - 1]
                assert made[-1]["vlm"] in held  # nothing has to be loaded for it, so it is immediate
                assert made[-1]["clip"] == clip
                server.until(lambda: made[-1]["number"] in traffic.releases())
        traffic.wait_for(80)
    report = traffic.report()
    assert (report.failed, report.mixed) == (0, 0), report.problems
    assert len({sample.release for sample in report.samples if sample.family == "vlm"}) >= 3
    assert len(replica(server)["resident"]) <= server.settings.serve.rollback_window + 1


def test_adapters_that_cannot_be_served_are_refused_while_answers_go_on(server: ServerFixture) -> None:
    corrupt = server.adapter()
    weights = Artifacts(server.settings.artifacts).fetch(f"adapters/{corrupt}") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    other_base = tiny_vlm_base(server.settings.home / "elsewhere", seed=5)
    folder = server.settings.home / "made" / "foreign"
    foreign = server.keep(tiny_vlm_adapter(other_base, folder, 7), folder, "vlm")
    with server.client() as client, server.traffic(rate=6, questions=True) as traffic:
        before = client.live()
        for family, name, why in (
            ("clip", corrupt, "cannot be served"),
            ("clip", server.nan_adapter("clip"), "finite"),
            ("vlm", server.nan_adapter("vlm"), "finite"),
            ("vlm", foreign, "base"),
        ):
            with pytest.raises(ServerError, match=why) as caught:
                client.release(**{family: name}, reason="bad")  # type: ignore[arg-type]
            assert caught.value.status == 422
            failed = server.ledger.proposals(1)[0]
            assert failed.state == "failed" and name in (failed.error or "")
        with pytest.raises(ServerError, match="vlm-ffffffffffff"):
            client.release(vlm="vlm-ffffffffffff", reason="nobody knows it")
        with pytest.raises(ServerError, match="no vlm adapter"):
            client.release(vlm=server.adapter(), reason="of the other family")
        traffic.wait_for(20)
        assert client.live() == before
    report = traffic.report()
    assert (report.failed, report.mixed) == (0, 0), report.problems


def test_a_client_that_goes_frees_its_place(server: ServerFixture) -> None:
    server.until(lambda: replica(server)["running"] == 0)
    gone = 'ratchet_vlm_requests_total{kind="stream",outcome="gone"}'
    before = server.metric(gone)
    shown = {"type": "image_url", "image_url": {"url": data_uri(server.images[0])}}
    content = [shown, {"type": "text", "text": "what is this?"}]
    with httpx.Client(base_url=server.url, timeout=20, trust_env=False) as client:
        for seed in range(8):
            body = {"model": "vlm", "stream": True, "temperature": 2, "seed": seed, "max_tokens": 128,
                    "messages": [{"role": "user", "content": content}]}  # fmt: skip
            response = client.send(client.build_request("POST", "/v1/chat/completions", json=body), stream=True)
            assert response.status_code == 200
            next(response.iter_lines())
            response.close()
    server.until(lambda: replica(server)["running"] == 0)
    assert server.metric(gone) > before, "every answer was finished before its client went"
    assert server.metric("ratchet_vlm_first_token_seconds_count") > 0


def test_a_collector_gets_a_search_and_a_chat_from_http_to_the_engine(
    server: ServerFixture, collector: OtlpCollector, tmp_path: Path
) -> None:
    picture = tmp_path / "traces.svg"
    figures = traces.measure(server.url, collector, True, 2, picture)
    assert {"intake", "queue", "forward", "search"} <= set(figures["search"]["names"])
    assert {"intake", "inspect", "decode", "engine"} <= set(figures["chat"]["names"])
    assert "<svg" in picture.read_text()


def test_a_killed_engine_shows_and_comes_back_with_what_is_live(server: ServerFixture) -> None:
    vlm = server.vlm_adapter()
    with server.client() as client:
        number = client.release(vlm=vlm, reason="before the kill")["number"]
        before = client.vqa(server.images[0], "what is this?")
        for model in (f"vlm@{number}", vlm):
            assert client.vqa(server.images[0], "what is this?", model=model)["answer"] == before["answer"]
        with pytest.raises(ServerError, match=re.escape(f"vlm@{number}")) as caught:
            client.vqa(server.images[0], "is it red?", model="vlm@99999")
        assert caught.value.status == 404

        own = server.settings.serve.vlm_engine == "vllm"  # else the engine is the replica's process itself
        (victim,) = server.engines() if own else server.pids("ServeReplica:ratchet:Vlm")
        os.kill(victim, signal.SIGKILL)
        with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as plain:
            assert plain.get("/health/live").status_code == 503 or not own
            assert len(client.embed(["CLIP goes on"])[0]) == server.base.dim
            server.until(lambda: plain.get("/health/live").status_code == 200)
        after = client.vqa(server.images[0], "what is this?")
        assert (after["answer"], after["release"], after["adapter"]) == (before["answer"], number, vlm)
    server.until(lambda: len(server.engines()) <= 1)


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


@pytest.mark.long
def test_no_engine_outlives_its_replica_or_the_next_start_of_its_server(server: ServerFixture) -> None:
    """Kills the server and does what its next start does first."""
    if server.settings.serve.vlm_engine != "vllm":
        pytest.skip("transformers has no process of its own")
    first = set(server.engines())
    assert first
    os.kill(server.pids("ServeReplica:ratchet:Vlm")[0], signal.SIGKILL)
    server.until(lambda: not first & set(server.engines()))
    server.until(server.engines)
    second = server.engines()
    server.kill_everything(but=second)
    end_leftovers(session_directory(server.settings))
    assert not set(second) & set(server.engines())
