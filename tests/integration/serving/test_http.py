"""The HTTP surface of a running server: search, heads, overload, clients that leave, and the metrics of all its
processes together.
"""

from __future__ import annotations

import asyncio
import io
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from core.ledger import Ledger
from ratchet_client import ServerError, data_uri, last_answer
from tests.integration.serving.server_fixture import ServerFixture
from tests.support.inputs import pictures

LISTENING = "0A"
Samples = dict[str, list[tuple[dict[str, str], float]]]


def post(server: ServerFixture, path: str, body: Any) -> httpx.Response:
    return httpx.post(server.url + path, timeout=30, trust_env=False, json=body)


def test_search_by_text_and_image_with_filters_also_by_a_catalog_that_was_killed(server: ServerFixture) -> None:
    server.until_covered()
    with server.client() as client:
        hits = client.search(text="cats number 3", k=10)
        assert len(hits) == 10
        assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
        old = client.search(text="anything", k=100, until="2023-12-31T00:00:00Z")
        assert {hit["domain"] for hit in old} == {"cats"}
        assert client.search(text="anything", source=["o'reilly'; --"]) == []
        found = client.search(image=server.images[0], k=1)
        assert found[0]["score"] == pytest.approx(1.0, abs=1e-3)  # the first sample is this very picture

        client.release(server.adapter(), reason="so that the first start's releases are not the resident ones")
        server.until_covered()
        os.kill(server.pids("ServeReplica:ratchet:Catalog")[0], signal.SIGKILL)
        maps = client.search(text="maps", k=100, domain=["maps"])
        assert {hit["domain"] for hit in maps} == {"maps"} and len(maps) == 16
        shown = httpx.get(f"{server.url}/v1/samples/{maps[0]['id']}/image?size=64", trust_env=False, timeout=20)
        assert Image.open(io.BytesIO(shown.content)).format == "PNG"
        assert shown.headers["cache-control"] == "private, no-store"
        server.until(lambda: client.status()["controller"]["replicas"]["Catalog"] == {"RUNNING": 1})


def test_the_index_stays_with_the_image_tower_and_is_complete_after_a_rollback(server: ServerFixture) -> None:
    server.until_covered()
    with server.client() as client:
        before = client.get("/v1/models/clip")
        client.release(server.adapter(towers=("text",)), reason="text only")
        text_only = client.get("/v1/models/clip")
        client.release(server.adapter(towers=("text",)), reason="another text tower")
        again = client.get("/v1/models/clip")
        assert text_only["image_space"] == again["image_space"]
        assert text_only["text_space"] != again["text_space"]

        client.release(server.adapter(), reason="new space")
        assert client.get("/v1/models/clip")["image_space"] not in (before["image_space"], again["image_space"])
        (added,) = server.add_samples(1, domain="late", year=2025)
        server.until(lambda: client.search(text="late", domain=["late"]))
        client.rollback(reason="take it back")
        answer = post(server, "/v1/search", {"text": "late", "k": 100})
        assert answer.json()["space"] == again["image_space"]
        assert added in {hit["id"] for hit in client.search(text="x", k=100, domain=["late"])}
        total = client.status()["catalog"]["corpus_rows"]
        assert len({hit["id"] for hit in answer.json()["data"]}) == min(100, total)


def test_resident_releases_can_be_addressed_and_others_are_named_as_missing(server: ServerFixture) -> None:
    texts = [f"text number {index}" for index in range(200)]  # in pieces, by both encoders
    with server.client() as client:
        first = client.release(server.adapter(), reason="one")
        client.release(server.adapter(), reason="two")
        wanted = server.expected(first["clip"], texts=texts)
        assert np.abs(client.embed(texts, model=f"clip@{first['number']}") - wanted).max() < 1e-3
        assert np.abs(client.embed(texts[:1], model=first["clip"]) - wanted[:1]).max() < 1e-3
        with pytest.raises(ServerError, match=f"clip@{first['number']}") as caught:
            client.embed(texts[:1], model="clip@999999")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_a_release_answers_by_its_own_head_and_a_rollback_takes_it_back(server: ServerFixture) -> None:
    labels = ["sea/cod", "sea/eel", "land"]
    shown = [(image, labels[number % 3]) for number, image in enumerate(pictures(24))]
    plain, headed = server.adapter(), server.adapter(labelled=shown)
    images = [image for image, _ in shown[:6]]
    body = {"images": [data_uri(image) for image in images], "head": "animals"}

    def classified(**more: Any) -> list[dict[str, Any]]:
        answer = post(server, "/v1/classify", body | more)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["data"])

    with server.client() as client:
        client.release(plain, reason="without")
        refused = post(server, "/v1/classify", body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "no_head")
        release = client.release(headed, reason="with a head")
        expected = server.head_of(headed).classify(server.expected(headed, images=images))
        for row, data in enumerate(classified()):
            assert list(data["probabilities"]) == sorted(labels)
            assert list(data["probabilities"].values()) == pytest.approx(expected.probabilities[row], abs=1e-3)
            assert data["distance"] == pytest.approx(expected.distance[row], rel=1e-2)
            assert (data["label"] is None) == (expected.distance[row] > 1)
        assert all(set(data["labels"]) <= set(labels) for data in classified(multi_label=True))
        every = classified(multi_label=True, confidence=0.0)
        assert {tuple(sorted(data["labels"])) for data in every} <= {(), tuple(sorted(labels))}
        assert {data["label"] for data in classified(confidence=1.0)} <= {None, "sea", *labels}
        other = post(server, "/v1/classify", {**body, "head": "plants"}).json()["error"]
        assert "animals" in other["message"] and other["param"] == "head"
        client.rollback(reason="back")
        assert post(server, "/v1/classify", body).status_code == 404
        assert classified(model=f"clip@{release['number']}"), "it is still resident, and may be named"


def test_the_answers_of_all_routes_can_be_reported(server: ServerFixture) -> None:
    with server.client() as client:
        picture, said = server.images[0], []
        for ask in (
            lambda: client.embed(["a cat"]),
            lambda: client.classify([picture], ["cat", "map"]),
            lambda: client.search("a cat", k=3),
            lambda: client.vqa(picture, "what is this?"),
            lambda: client.chat([picture, "what is this?"], max_tokens=2),
        ):
            ask()
            said.append(client.feedback(last_answer(), "wrong", comment="a test"))
        assert [each["route"] for each in said] == ["embeddings", "classify", "search", "vqa", "chat"]
        assert client.feedback(last_answer(), "wrong", comment="a test") == {**said[-1], "repeated": True}
        rows = Ledger.open(server.settings.ledger).feedback()
        assert {row.id for row in rows} == {each["id"] for each in said}
        assert {row.release for row in rows} == {client.live()}
        assert 'ratchet_feedback_total{route="search",verdict="wrong"} 1.0' in client.metrics()


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
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert {answer.json()["error"]["type"] for answer in refused} == {"rate_limit_error"}
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
    inodes = sockets_of(server.pids("ServeReplica", "haproxy"))
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


def sockets_of(pids: list[int]) -> dict[str, str]:
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


def scraped(server: ServerFixture) -> Samples:
    page = httpx.get(f"{server.url}/metrics", trust_env=False, timeout=20).text
    found: Samples = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def scraped_when(server: ServerFixture, condition: Callable[[Samples], object]) -> Samples:
    seen: list[Samples] = []

    def holds() -> object:
        seen.append(scraped(server))
        return condition(seen[-1])

    server.until(holds)
    return seen[-1]


def test_every_replica_says_which_release_it_serves_and_the_catalog_how_well_it_finds(server: ServerFixture) -> None:
    with server.client("metrics") as client:
        number = client.release(clip=server.adapter(), reason="to be seen")["number"]
    encoders = server.settings.serve.encoder_replicas
    replicas = {"ingress": 1, "controller": 1, "catalog": 1, "vlm": 1, "encoder": encoders}

    def parts(found: Samples) -> Counter[tuple[str, float]]:
        return Counter((labels["part"], release) for labels, release in found.get("ratchet_release_live", []))

    every_replica = Counter({(part, number): count for part, count in replicas.items()})
    found = scraped_when(server, lambda found: parts(found) == every_replica)
    [(_, committed)] = found["ratchet_release_committed_timestamp_seconds"]
    assert 0 <= time.time() - committed < 120
    gains = {labels["family"]: gain for labels, gain in found["ratchet_release_gain_ratio"]}
    assert gains.keys() == {"clip", "vlm"} and math.isnan(gains["clip"])  # this adapter was not judged
    assert sum(count for labels, count in found["ratchet_build_info"] if labels["part"] == "encoder") == encoders
    assert all(name.startswith(("ratchet_", "vllm:")) for name in found)  # Ray's own are scraped from Ray
    assert not any(name.startswith(("ratchet_ingest_", "ratchet_gate_", "ratchet_budget_")) for name in found)

    needed = {"ratchet_catalog_rows", "ratchet_catalog_recall_ratio", "ratchet_drift_mean_shift"}
    found = scraped_when(server, lambda found: needed <= found.keys() and found["ratchet_catalog_rows"][0][1] >= 40)
    assert found["ratchet_catalog_recall_ratio"][0][1] == 1.0
    assert found["ratchet_catalog_fragments"][0][1] >= 1
    [(labels, shift)] = found["ratchet_drift_mean_shift"]
    assert labels == {"space": "image"} and shift > 0


def test_requests_are_counted_once_answered_and_nothing_stays_in_flight(server: ServerFixture) -> None:
    answered = 'ratchet_http_requests_total{route="/v1/embeddings",status="200"}'
    before = server.metric(answered)
    with server.client() as client:
        for _ in range(3):
            client.embed(["counted"])
    assert server.metric(answered) == before + 3
    name = "ratchet_release_in_flight_requests"
    ages = scraped_when(server, lambda found: not sum(count for _, count in found[name]))[name]
    assert {labels["age"] for labels, _ in ages} == {"live", "incumbent", "older"}
    assert server.metric("ratchet_encoder_waiting_requests") == 0
