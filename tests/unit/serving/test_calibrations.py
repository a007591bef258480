"""Probabilities of matches over HTTP, and the artifacts that they are read from."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.artifacts import Artifacts
from core.errors import AdapterError, ArtifactsUnavailable
from core.settings.serving import Serve
from serving.catalog.queries import Hit
from serving.engines.calibration import Calibration, Kind, MatchCurve, calibration_key, dump_calibration
from serving.errors import Unavailable
from serving.http.calibrations import Calibrations, with_probabilities
from serving.http.errors import ApiError
from serving.releases.types import ReleaseSnapshot
from tests.support.in_process_app import AppClient, InProcessApp, open_in_process_app
from tests.unit.serving.scripted_vlms import uri

LIVE = ReleaseSnapshot(1, None, "image-1", "text-1")
CURVE = MatchCurve((-1.0, 1.0), (0.0, 1.0), 100, 1000, 100, 0.01, 0.0, 0.02)
"""The probability is half of one more than the similarity."""
KINDS: tuple[Kind, ...] = ("text", "label", "image")


class Store:
    """An artifact that may be missing, away or damaged; counts its readings."""

    def __init__(self, outcome: bytes | Exception) -> None:
        self.outcome = outcome
        self.read = 0

    def __call__(self, key: str) -> bytes:
        assert key == "calibrations/image-1-text-1.json"
        self.read += 1
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


async def test_a_calibration_is_read_once_for_a_release_by_all_who_ask() -> None:
    store = Store(dump_calibration(Calibration({"text": CURVE})))
    calibrations = Calibrations(store)
    found = await asyncio.gather(*(calibrations.curve("text", LIVE, 0.5) for _ in range(20)))
    assert found == [CURVE] * 20 and store.read == 1
    assert await calibrations.curve("image", LIVE, None) is None and store.read == 1


async def test_without_a_calibration_there_is_no_probability_and_asking_for_one_says_what_makes_it() -> None:
    store = Store(AdapterError("it is not there."))
    calibrations = Calibrations(store)
    assert await calibrations.curve("text", LIVE, None) is None
    with pytest.raises(ApiError, match="ratchet gate calibrate") as told:
        await calibrations.curve("text", LIVE, 0.5)
    assert (told.value.status_code, told.value.param, told.value.code) == (409, "min_probability", "not_calibrated")
    assert store.read == 1  # and not again for half a minute


async def test_a_calibration_that_was_made_since_is_found() -> None:
    store = Store(AdapterError("it is not there."))
    calibrations = Calibrations(store, again=0.0)
    assert await calibrations.curve("text", LIVE, None) is None
    store.outcome = dump_calibration(Calibration({"text": CURVE}))
    assert await calibrations.curve("text", LIVE, 0.5) == CURVE


async def test_probabilities_that_may_be_too_wrong_are_told_but_decide_nothing() -> None:
    wide = replace(CURVE, error=0.04, ci_high=0.07)
    calibrations = Calibrations(Store(dump_calibration(Calibration({"text": wide}))))
    assert await calibrations.curve("text", LIVE, None) == wide
    with pytest.raises(ApiError, match="may exceed 5%"):
        await calibrations.curve("text", LIVE, 0.0)


@pytest.mark.parametrize(
    "outcome", [ArtifactsUnavailable("the store is away.", "Look."), OSError("disk"), b"{", b"[1]"]
)
async def test_artifacts_that_are_away_or_damaged_leave_probabilities_out(outcome: bytes | Exception) -> None:
    calibrations = Calibrations(Store(outcome))
    assert await calibrations.curve("text", LIVE, None) is None
    with pytest.raises(Unavailable, match="cannot be read"):
        await calibrations.curve("text", LIVE, 0.5)
    with pytest.raises(Unavailable, match="cannot be read"):
        await calibrations.check_length(16, LIVE, 32)
    await calibrations.check_length(32, LIVE, 32)  # the full length needs no measurement


async def test_a_calibration_of_before_lengths_were_measured_has_none() -> None:
    older = json.loads(dump_calibration(Calibration({"text": CURVE})))
    del older["lengths"]
    calibrations = Calibrations(Store(json.dumps(older).encode()))
    assert await calibrations.curve("text", LIVE, 0.5) == CURVE
    with pytest.raises(ApiError, match="send 32, or leave"):
        await calibrations.check_length(16, LIVE, 32)


async def test_a_store_that_hangs_delays_one_request_for_a_bounded_time() -> None:
    released = threading.Event()

    def hanging(key: str) -> bytes:
        released.wait()
        return b"{}"

    calibrations = Calibrations(hanging, seconds=0.01)
    try:
        assert await calibrations.curve("text", LIVE, None) is None
        with pytest.raises(Unavailable, match="did not answer"):
            await calibrations.curve("text", LIVE, 0.5)
    finally:
        released.set()


def test_hits_below_the_least_probability_are_left_out() -> None:
    hits = [Hit(str(score), score, "", "", "", None) for score in (0.8, 0.2, -0.4, float("nan"))]
    found = with_probabilities(hits, CURVE, None)
    assert [each.probability for each in found][:3] == pytest.approx([0.9, 0.6, 0.3])
    assert [each.id for each in with_probabilities(hits, CURVE, 0.6)] == ["0.8", "0.2"]
    assert with_probabilities(hits, None, 0.6) == hits


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def opened(runner: asyncio.Runner, tmp_path: Path) -> tuple[AppClient, InProcessApp, Path]:
    in_process, app = runner.run(open_in_process_app(tmp_path, Serve()))
    return AppClient(runner, app), in_process, tmp_path


def calibrated(in_process: InProcessApp, home: Path) -> None:
    spaces = in_process.engine.spaces(None)
    found = Calibration(dict.fromkeys(KINDS, CURVE), (in_process.engine.base.dim // 2,))
    key = calibration_key(spaces.image, spaces.text)
    Artifacts(str(home / "artifacts")).write_bytes(key, dump_calibration(found))


QUERIES: list[dict[str, Any]] = [{"text": "a cat"}, {"image": uri()}]


@pytest.mark.parametrize("query", QUERIES, ids=["text", "image"])
def test_hits_have_probabilities_once_the_release_is_calibrated(
    opened: tuple[AppClient, InProcessApp, Path], query: dict[str, Any]
) -> None:
    client, in_process, home = opened
    before = client.post("/v1/search", json=query).json()["data"]
    assert before and all(hit["probability"] is None for hit in before)
    refused = client.post("/v1/search", json={**query, "min_probability": 0.5})
    assert refused.status_code == 409 and "ratchet gate calibrate" in refused.json()["error"]["message"]
    calibrated(in_process, home)
    hits = client.post("/v1/search", json=query).json()["data"]
    assert [hit["probability"] for hit in hits] == pytest.approx([(1 + hit["score"]) / 2 for hit in hits])
    middle = hits[len(hits) // 2]["probability"]
    some = client.post("/v1/search", json={**query, "min_probability": middle}).json()["data"]
    assert [hit["id"] for hit in some] == [hit["id"] for hit in hits if hit["probability"] >= middle]


def test_vectors_are_cut_to_the_lengths_that_the_gate_measured_and_others_are_told_these(
    opened: tuple[AppClient, InProcessApp, Path],
) -> None:
    client, in_process, home = opened
    dim = in_process.engine.base.dim
    asked = {"input": ["a cat", {"image": uri()}]}
    whole = np.array([row["embedding"] for row in client.post("/v1/embeddings", json=asked).json()["data"]])
    before = client.post("/v1/embeddings", json={**asked, "dimensions": dim // 2})
    assert before.status_code == 400 and f"send {dim}, or" in before.json()["error"]["message"]
    calibrated(in_process, home)
    for encoding in ("float", "base64"):
        body = {**asked, "dimensions": dim // 2, "encoding_format": encoding}
        said = [row["embedding"] for row in client.post("/v1/embeddings", json=body).json()["data"]]
        rows = np.array([np.frombuffer(base64.b64decode(row), "<f4") if isinstance(row, str) else row for row in said])
        first = whole[:, : dim // 2]
        np.testing.assert_allclose(rows, first / np.linalg.norm(first, axis=1, keepdims=True), rtol=1e-5)
    for wrong in (0, -1, dim // 4, dim + 1):
        error = client.post("/v1/embeddings", json={**asked, "dimensions": wrong}).json()["error"]
        assert (error["param"], error["code"]) == ("dimensions", "unsupported_dimensions")
        assert f"send {dim} or {dim // 2}, or leave it out" in error["message"]
    full = client.post("/v1/embeddings", json={**asked, "dimensions": dim}).json()["data"]
    assert np.array_equal([row["embedding"] for row in full], whole)


def test_a_label_below_the_least_probability_is_null_and_matches_do_not_depend_on_the_other_labels(
    opened: tuple[AppClient, InProcessApp, Path],
) -> None:
    client, in_process, home = opened
    asked = {"images": [uri()], "labels": ["cat", "dog", "bus"]}
    (bare,) = client.post("/v1/classify", json=asked).json()["data"]
    assert bare["matches"] is None and bare["label"]
    assert client.post("/v1/classify", json={**asked, "min_probability": 0.5}).status_code == 409
    calibrated(in_process, home)
    (said,) = client.post("/v1/classify", json=asked).json()["data"]
    (alone,) = client.post("/v1/classify", json={**asked, "labels": [said["label"]]}).json()["data"]
    least = said["matches"][said["label"]]
    assert {*said["matches"]} == {*asked["labels"]} and alone["matches"][said["label"]] == pytest.approx(least)
    assert least == pytest.approx(max(said["matches"].values())) and said["probabilities"] == bare["probabilities"]
    labels = [
        client.post("/v1/classify", json={**asked, "min_probability": bound}).json()["data"][0]["label"]
        for bound in (float(np.nextafter(least, 0)), min(1.0, least + 1e-6))
    ]
    assert labels == [said["label"], None]


def test_a_head_has_a_confidence_and_no_least_probability(opened: tuple[AppClient, InProcessApp, Path]) -> None:
    answer = opened[0].post("/v1/classify", json={"images": [uri()], "head": "shapes", "min_probability": 0.5})
    assert answer.status_code == 400 and "min_probability" in answer.json()["error"]["message"]
