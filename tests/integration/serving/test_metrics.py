"""The metrics of a real server: those of all its processes together, and no foreign ones."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from core.errors import RatchetError
from tests.integration.serving.server_fixture import ServerFixture

pytestmark = pytest.mark.integration
Samples = dict[str, list[tuple[dict[str, str], float]]]


def scraped(server: ServerFixture) -> Samples:
    page = httpx.get(f"{server.url}/metrics", trust_env=False, timeout=20).text
    found: Samples = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def value(server: ServerFixture, name: str, **labels: str) -> float:
    return sum(v for ours, v in scraped(server).get(name, []) if labels.items() <= ours.items())


def until(server: ServerFixture, condition: Callable[[Samples], bool]) -> Samples:
    deadline = time.monotonic() + 60
    while not condition(found := scraped(server)):
        assert time.monotonic() < deadline, {name: found[name] for name in found if "catalog" in name or "live" in name}
        time.sleep(0.3)
    return found


def live(samples: Samples) -> dict[str, list[float]]:
    parts: dict[str, list[float]] = {}
    for labels, number in samples.get("ratchet_release_live", []):
        parts.setdefault(labels["part"], []).append(number)
    return parts


def test_every_replica_says_which_release_it_serves(server: ServerFixture) -> None:
    with server.client("metrics") as client:
        number = client.release(clip=server.adapter(), reason="to be seen")["number"]
    replicas = {"ingress": 1, "controller": 1, "catalog": 1, "encoder": server.settings.serve.encoder_replicas}
    call_every_replica = {part: [number] * count for part, count in replicas.items()}
    found = until(server, lambda samples: live(samples) == call_every_replica)
    [(_, committed)] = found["ratchet_release_committed_timestamp_seconds"]
    assert 0 <= time.time() - committed < 120
    gains = {labels["family"]: gain for labels, gain in found["ratchet_release_gain_ratio"]}
    assert list(gains) == ["clip"] and gains["clip"] != gains["clip"]  # NaN: this adapter was not judged


def test_the_catalog_is_measured_against_exact_search(server: ServerFixture) -> None:
    found = until(
        server,
        lambda samples: samples["ratchet_catalog_rows"][0][1] >= 40 and "ratchet_catalog_recall_ratio" in samples,
    )
    assert found["ratchet_catalog_recall_ratio"][0][1] == 1.0
    assert found["ratchet_catalog_fragments"][0][1] >= 1
    [(labels, shift)] = found["ratchet_drift_mean_shift"]
    assert labels == {"space": "image"} and shift > 0


def test_what_operators_do_is_counted_also_when_it_is_refused(server: ServerFixture) -> None:
    name = "ratchet_operator_actions_total"
    done, refused = (value(server, name, action="rollback", outcome=outcome) for outcome in ("done", "refused"))
    with server.client("metrics") as client:
        client.release(clip=server.adapter(), reason="to be taken back")
        client.rollback("seen enough")
        with pytest.raises(RatchetError):
            client.rollback("too late", expected_live=1)
    assert value(server, name, action="rollback", outcome="done") == done + 1
    assert value(server, name, action="rollback", outcome="refused") == refused + 1
    assert value(server, "ratchet_http_refused_total", reason="release_conflict") >= 1


def test_requests_are_counted_once_answered_and_nothing_stays_in_flight(server: ServerFixture) -> None:
    route = {"route": "/v1/embeddings", "status": "200"}
    before = value(server, "ratchet_http_requests_total", **route)
    with server.client() as client:
        for _ in range(3):
            client.embed(["counted"])
    assert value(server, "ratchet_http_requests_total", **route) == before + 3
    ages = until(server, lambda samples: not sum(v for _, v in samples["ratchet_release_in_flight_requests"]))
    assert {labels["age"] for labels, _ in ages["ratchet_release_in_flight_requests"]} == {"live", "incumbent", "older"}
    assert value(server, "ratchet_encoder_waiting_requests") == 0


def test_only_what_is_servings_own_is_exported(server: ServerFixture) -> None:
    names = set(scraped(server))
    assert all(name.startswith("ratchet_") for name in names)  # Ray's own are scraped from Ray
    assert not any(name.startswith(("ratchet_ingest_", "ratchet_gate_", "ratchet_budget_")) for name in names)
    assert value(server, "ratchet_build_info", part="encoder") == server.settings.serve.encoder_replicas
