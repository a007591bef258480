"""A head is served with its release, and removed by a rollback."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from ratchet_client import data_uri
from tests.integration.serving.server_fixture import ServerFixture
from tests.support.inputs import pictures

pytestmark = pytest.mark.integration


def classify(server: ServerFixture, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/classify", json=body, timeout=30)


def test_a_release_answers_by_its_own_head_and_a_rollback_takes_it_back(server: ServerFixture) -> None:
    labels = ["sea/cod", "sea/eel", "land"]
    shown = [(image, labels[number % 3]) for number, image in enumerate(pictures(24))]
    plain, headed = server.adapter(), server.adapter(labelled=shown)
    body = {"images": [data_uri(image) for image, _ in shown[:6]], "head": "animals"}
    with server.client() as client:
        client.release(plain, reason="without")
        refused = classify(server, body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "no_head")
        release = client.release(headed, reason="with a head")
        answer = classify(server, body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-ratchet-release"] == str(release["number"])
        expected = server.head_of(headed).classify(server.expected(headed, images=[image for image, _ in shown[:6]]))
        for row, data in enumerate(answer.json()["data"]):
            assert list(data["probabilities"]) == sorted(labels)
            assert list(data["probabilities"].values()) == pytest.approx(expected.probabilities[row], abs=1e-3)
            assert data["distance"] == pytest.approx(expected.distance[row], rel=1e-2)
            assert (data["label"] is None) == (expected.distance[row] > 1)
        several = classify(server, {**body, "multi_label": True}).json()["data"]
        assert all(set(data["labels"]) <= set(labels) for data in several)
        every = classify(server, {**body, "multi_label": True, "confidence": 0.0}).json()["data"]
        assert {tuple(sorted(data["labels"])) for data in every} <= {(), tuple(sorted(labels))}
        unsure = classify(server, {**body, "confidence": 1.0}).json()["data"]
        assert {data["label"] for data in unsure} <= {None, "sea", *labels}
        other = classify(server, {**body, "head": "plants"}).json()["error"]
        assert "animals" in other["message"] and other["param"] == "head"
        client.rollback(reason="back")
        assert classify(server, body).status_code == 404
        still = {**body, "model": f"clip@{release['number']}"}
        assert classify(server, still).status_code == 200  # it is still resident, and may be named
