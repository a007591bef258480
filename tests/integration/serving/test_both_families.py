"""A VLM next to the CLIP: releases under a mixed load, refused adapters, engines that die, clients that disconnect."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks import traces
from benchmarks.otlp_collector import OtlpCollector
from core.artifacts import Artifacts
from ratchet_client import ServerError, data_uri
from serving.ray.ray_session import end_leftovers, session_directory
from tests.integration.serving.server_fixture import ServerFixture
from tests.support.tiny_vlm import tiny_vlm_adapter, tiny_vlm_base

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


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
