"""A VLM next to the CLIP: releases under a mixed load, refused adapters, engines that die, clients that disconnect."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import traces
from benchmarks.otlp_collector import OtlpCollector
from core.artifacts import Artifacts
from ratchet_client import ServerError, data_uri
from serving.engines.adapters import write_adapter
from serving.ray.ray_session import end_leftovers, session_directory
from tests.integration.serving.server_fixture import ServerFixture
from tests.support.tiny_vlm import tiny_vlm_adapter, tiny_vlm_base

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]
SWAPS = 10


@pytest.fixture
def server(shared_vlm_server: ServerFixture) -> ServerFixture:
    shared_vlm_server.ensure_running()
    return shared_vlm_server


def replica(server: ServerFixture) -> dict[str, Any]:
    with server.client() as client:
        found: dict[str, Any] = client.status()["controller"]["vlm"][0]
        return found


def test_swaps_and_rollbacks_under_mixed_load_fail_and_mix_nothing(server: ServerFixture) -> None:
    names = [server.vlm_adapter() for _ in range(5)]
    clips = [server.adapter() for _ in range(2)]
    made = []
    with server.client() as client, server.traffic(rate=12) as traffic:
        traffic.wait_for(12)
        for count in range(SWAPS):
            if count % 5 == 4:
                held = replica(server)["resident"]
                made.append(client.rollback("back", family="vlm"))
                assert made[-1]["vlm"] in held  # nothing has to be loaded for it, so it is immediate
            else:
                made.append(client.release(vlm=names[count % len(names)], reason="swap"))
            if count in (3, 7):
                client.release(clips[count % 2], reason="CLIP in between")
            time.sleep(0.4)
        traffic.wait_for(80)
    report = traffic.report()
    assert report.failed == 0, report.problems
    assert report.mixed == 0, report.problems
    answered = {sample.release for sample in report.samples if sample.family == "vlm"}
    assert len(answered) >= SWAPS // 2
    assert sum(outcome["kind"] == "rollback" for outcome in made) == SWAPS // 5
    assert len(replica(server)["resident"]) <= server.settings.serve.rollback_window + 1


def test_a_release_of_one_keeps_the_other_and_so_does_a_rollback(server: ServerFixture) -> None:
    clip, vlm = server.adapter(), server.vlm_adapter()
    with server.client() as client:
        client.release(server.adapter(), reason="before", vlm=server.vlm_adapter())
        client.release(clip, reason="CLIP alone")
        spaces = client.status()["catalog"]["spaces"].keys()
        outcome = client.release(vlm=vlm, reason="VLM alone")
        assert (outcome["clip"], outcome["vlm"], outcome["family"]) == (clip, vlm, "vlm")
        assert client.status()["catalog"]["spaces"].keys() <= spaces  # no image space was made for it
        back = client.rollback("CLIP alone", family="clip")
        assert back["vlm"] == vlm
        assert back["clip"] != clip
        again = client.rollback("VLM alone", family="vlm")
        assert again["clip"] == back["clip"]
        assert again["vlm"] not in (vlm, None)
        assert client.search("cat", k=8), "the index of the CLIP adapter that came back is complete"


def test_an_update_of_the_vlm_is_released_when_it_is_proposed(server: ServerFixture) -> None:
    vlm = server.vlm_adapter()
    before = server.ledger.live()
    server.propose_update(vlm, "vlm")
    server.until(lambda: server.ledger.live() != before)
    live = server.ledger.live()
    assert live is not None and before is not None
    assert (live.clip, live.vlm) == (before.clip, vlm)


def test_what_requests_may_name(server: ServerFixture) -> None:
    vlm = server.vlm_adapter()
    with server.client() as client:
        number = client.release(vlm=vlm, reason="named")["number"]
        answers = [
            client.chat([server.images[0], "what is this?"], model=model, temperature=0, max_tokens=8)
            for model in ("vlm", f"vlm@{number}", vlm)
        ]
        assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == 1
        asked = client.vqa(server.images[0], "is it red?", choices=["yes", "no"])
        assert asked["adapter"] == vlm
        assert abs(sum(choice["probability"] for choice in asked["choices"]) - 1) < 1e-3
        for model in ("vlm@99999", "nobody", "clip"):
            with pytest.raises(ServerError, match=f"vlm@{number}") as caught:
                client.vqa(server.images[0], "is it red?", model=model)
            assert caught.value.status == 404


def test_bad_adapters_are_refused_while_answers_go_on(server: ServerFixture) -> None:
    assert server.vlm is not None
    good = Artifacts(server.settings.artifacts).fetch(f"adapters/{server.vlm_adapter()}")
    tensors = load_file(good / "adapter_model.safetensors")
    first = sorted(tensors)[0]
    nan = server.settings.home / "made" / "nan"
    config = json.loads((good / "adapter_config.json").read_text())
    broken = {**tensors, first: torch.full_like(tensors[first], float("nan"))}
    names = {server.keep_vlm(write_adapter(nan, broken, config, server.vlm), nan): "finite"}
    other = tiny_vlm_base(server.settings.home / "elsewhere", seed=5)
    foreign = server.settings.home / "made" / "foreign"
    names[server.keep_vlm(tiny_vlm_adapter(other, foreign, 7), foreign)] = "base"
    with server.client() as client, server.traffic(rate=6) as traffic:
        before = client.live()
        for name, why in names.items():
            with pytest.raises(ServerError, match=why) as caught:
                client.release(vlm=name, reason="bad")
            assert caught.value.status == 422
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
    before = gone(server)
    bodies = [
        {
            "model": "vlm", "stream": True, "temperature": 2, "seed": seed, "max_tokens": 128,
            "messages": [{"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": data_uri(server.images[0])}},
                {"type": "text", "text": "what is this?"}]}],
        }
        for seed in range(8)
    ]  # fmt: skip
    with httpx.Client(base_url=server.url, timeout=20, trust_env=False) as client:
        for body in bodies:
            request = client.build_request("POST", "/v1/chat/completions", json=body)
            response = client.send(request, stream=True)
            assert response.status_code == 200
            next(response.iter_lines())
            response.close()
    server.until(lambda: replica(server)["running"] == 0)
    assert gone(server) > before, "every answer was finished before its client went"
    assert "ratchet_vlm_first_token_seconds_count" in exposition(server)


def exposition(server: ServerFixture) -> str:
    return httpx.get(f"{server.url}/metrics", trust_env=False).text


def gone(server: ServerFixture) -> float:
    """Streams that ended because their client disconnected."""
    found = re.findall(r'ratchet_vlm_requests_total\{kind="stream",outcome="gone"\} (\S+)', exposition(server))
    return sum(map(float, found))


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


@pytest.mark.long
def test_no_engine_outlives_its_replica_or_the_next_start_of_its_server(server: ServerFixture) -> None:
    """Must be the last test of the server: it kills it and does what its next start does first."""
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
