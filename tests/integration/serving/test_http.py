"""The HTTP surface of a running server: OpenAI's client, search, hostile input, overload."""

from __future__ import annotations

import asyncio
import io
import os
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ops.cli.main import app
from ratchet_client import ServerError, data_uri
from serving.ray.ray_session import HEAD_ALLOCATOR
from tests.integration.serving.server_fixture import ServerFixture

LISTENING = "0A"
pytestmark = pytest.mark.integration


def post(server: ServerFixture, path: str, body: Any = None, **options: Any) -> httpx.Response:
    if body is not None:
        options["json"] = body
    return httpx.post(server.url + path, timeout=30, trust_env=False, **options)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def covered(server: ServerFixture) -> None:
    with server.client() as client:
        server.until(lambda: client.status()["catalog"]["corpus_rows"] >= 40)
        server.until(lambda: client.status()["catalog"]["coverage"] >= 1.0)


def test_images_as_openai_items_and_as_objects_give_the_engines_vectors(server: ServerFixture) -> None:
    image = server.images[0]
    items = [{"type": "image_url", "image_url": {"url": data_uri(image)}}, {"image": data_uri(image)}, "a cat"]
    answer = post(server, "/v1/embeddings", {"model": "clip", "input": items})
    assert answer.status_code == 200, answer.text
    adapter = answer.headers["x-ratchet-adapter"]
    want = server.expected(None if adapter == "base" else adapter, images=[image], texts=["a cat"])
    got = np.array([row["embedding"] for row in answer.json()["data"]], np.float32)
    assert np.abs(got - want[[0, 0, 1]]).max() < 1e-3


def test_a_request_of_many_items_comes_back_in_order(server: ServerFixture) -> None:
    texts = [f"text number {index}" for index in range(200)]
    with server.client() as client:
        together = np.asarray(client.embed(texts))
        alone = np.asarray(client.embed([texts[150]]))
    assert together.shape == (200, server.base.dim)
    assert np.abs(together[150] - alone[0]).max() < 1e-3


def test_the_command_that_checks_an_installation_passes(server: ServerFixture) -> None:
    done = CliRunner().invoke(app, ["--config", str(server.config), "doctor", "--server", server.url, "--wait", "10"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert f"{server.url} embeds texts as release " in done.output


def test_search_by_text_and_image_with_filters(server: ServerFixture) -> None:
    covered(server)
    with server.client() as client:
        hits = client.search(text="cats number 3", k=10)
        assert len(hits) == 10
        assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
        maps = client.search(text="anything", k=100, domain=["maps"])
        assert {hit["domain"] for hit in maps} == {"maps"}
        assert len(maps) == 16
        old = client.search(text="anything", k=100, until="2023-12-31T00:00:00Z")
        assert {hit["domain"] for hit in old} == {"cats"}
        assert client.search(text="anything", source=["o'reilly'; --"]) == []
        image = client.sample_image(maps[0]["id"], size=64)
        assert Image.open(io.BytesIO(image)).format == "PNG"
        shown = httpx.get(f"{server.url}/v1/samples/{maps[0]['id']}/image", trust_env=False, timeout=20)
        assert shown.headers["cache-control"] == "private, no-store"
        found = client.search(image=server.images[0], k=1)
        assert found[0]["score"] == pytest.approx(1.0, abs=1e-3)  # the first sample is this very picture


def test_after_a_rollback_the_index_is_complete_and_of_the_same_space(server: ServerFixture) -> None:
    covered(server)
    with server.client() as client:
        before = client.get("/v1/models/clip")
        client.release(server.adapter(), reason="new space")
        swapped = client.get("/v1/models/clip")
        assert swapped["image_space"] != before["image_space"]
        (added,) = server.add_samples(1, domain="late", year=2025)
        server.until(lambda: client.search(text="late", domain=["late"]))
        client.rollback(reason="take it back")
        answer = post(server, "/v1/search", {"text": "late", "k": 100})
        assert answer.json()["space"] == before["image_space"]
        assert added in {hit["id"] for hit in client.search(text="x", k=100, domain=["late"])}
        total = client.status()["catalog"]["corpus_rows"]
        assert len({hit["id"] for hit in answer.json()["data"]}) == min(100, total)


def test_a_catalog_that_was_killed_answers_again_from_the_ledger(server: ServerFixture) -> None:
    with server.client() as client:
        client.release(server.adapter(), reason="so that the first start's releases are not the resident ones")
        covered(server)
        os.kill(server.pids("ServeReplica:ratchet:Catalog")[0], signal.SIGKILL)
        hits = client.search(text="maps", k=100, domain=["maps"])
        server.until(lambda: client.status()["controller"]["replicas"]["Catalog"] == {"RUNNING": 1})
    assert len(hits) == 16


def test_a_change_of_the_text_tower_keeps_the_index(server: ServerFixture) -> None:
    with server.client() as client:
        spaces = []
        for _ in range(2):
            client.release(server.adapter(towers=("text",)), reason="text only")
            spaces.append(client.get("/v1/models/clip"))
    assert spaces[0]["image_space"] == spaces[1]["image_space"]
    assert spaces[0]["text_space"] != spaces[1]["text_space"]


def test_resident_releases_can_be_addressed_and_others_are_named_as_missing(server: ServerFixture) -> None:
    with server.client() as client:
        first = client.release(server.adapter(), reason="one")
        client.release(server.adapter(), reason="two")
        text = "addressed by number"
        got = np.asarray(client.embed([text], model=f"clip@{first['number']}"))
        assert np.abs(got - server.expected(first["clip"], texts=[text])).max() < 1e-3
        assert np.abs(client.embed([text], model=first["clip"]) - got).max() < 1e-3
        with pytest.raises(ServerError, match=f"clip@{first['number']}") as caught:
            client.embed([text], model="clip@999999")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_overload_is_answered_429_with_retry_after_and_then_all_is_well(server: ServerFixture) -> None:
    queue = server.settings.serve.queue
    beyond = queue - int(queue * server.settings.serve.caller_share)

    async def storm() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=queue)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits, trust_env=False) as client:
            with server.stopped_encoders():
                tasks = [asyncio.create_task(client.post("/v1/embeddings", json={"input": "x"})) for _ in range(queue)]
                await asyncio.to_thread(server.until, lambda: sum(task.done() for task in tasks) >= beyond)
            return await asyncio.gather(*tasks)

    answers = asyncio.run(storm())
    counts = Counter(answer.status_code for answer in answers)
    assert set(counts) <= {200, 429, 504}, counts
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) == beyond, counts
    for answer in refused:
        assert int(answer.headers["retry-after"]) >= 1
        assert error_of(answer)["type"] == "rate_limit_error"
    assert counts[200] > 0
    with server.client() as client:
        assert len(client.embed(["calm again"])[0]) == server.base.dim


def encoded_texts(server: ServerFixture) -> float:
    return server.metric('ratchet_encoder_batch_size_sum{kind="text"}')


def test_clients_that_went_away_are_not_computed_for(server: ServerFixture) -> None:
    texts = ["gone " * 15] * 256  # more than the front's buffer of 16 KB
    requests = 8  # of eight calls each: all of them are with an encoder, and none waits for a place
    with server.client() as client:
        client.embed(["warm"] * 128)
        before = encoded_texts(server)

        async def leave() -> None:
            async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as leaving:
                tasks = [
                    asyncio.create_task(leaving.post("/v1/embeddings", json={"input": texts})) for _ in range(requests)
                ]
                await asyncio.to_thread(server.until, lambda: server.requests_in_flight() >= requests)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        with server.stopped_encoders():
            asyncio.run(leave())
            server.until(lambda: server.requests_in_flight() == 0)
        witnesses = 8  # they queue behind what is left, with both encoders
        with ThreadPoolExecutor(witnesses) as pool:
            list(pool.map(client.embed, [["still here"] * 64] * witnesses))
    assert encoded_texts(server) - before - 64 * witnesses < requests * len(texts) / 2


def test_only_loopback_listens(server: ServerFixture) -> None:
    """Our API, HAProxy's pages and the calls between deployments do not listen on other addresses."""
    inodes = _sockets_of(server.pids("ServeReplica", "haproxy"))
    by_process: dict[str, list[str]] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in inodes:
                host = fields[1].split(":")[0]
                by_process.setdefault(inodes[fields[9]], []).append("any" if set(host) == {"0"} else "loopback")
    assert by_process["haproxy"]
    assert "any" not in by_process.pop("haproxy")
    for name, hosts in by_process.items():
        # Ray's own port of each worker asks for the session's token; there must be no second one.
        assert hosts.count("any") <= 1, (name, hosts)
        assert "loopback" in hosts


def test_rays_head_gives_back_what_it_frees(server: ServerFixture) -> None:
    (head,) = server.pids("ray/core/src/ray/gcs/gcs_server")
    variables = Path(f"/proc/{head}/environ").read_bytes().split(b"\0")
    assert f"MALLOC_CONF={HEAD_ALLOCATOR}".encode() in variables


def _sockets_of(pids: list[int]) -> dict[str, str]:
    found = {}
    for pid in pids:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        name = "haproxy" if b"haproxy" in command else str(pid)
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = str(link.readlink())
            except OSError:
                continue
            if target.startswith("socket:["):
                found[target[8:-1]] = name
    return found
