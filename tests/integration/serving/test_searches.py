"""Searches over HTTP, with a real CLIP and no Ray: queries of each kind and several at once, pages, and vectors."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from ratchet_client import data_uri
from serving.http.search import _unit
from tests.support.in_process_app import AppClient, InProcessApp
from tests.support.inputs import pictures

URI = data_uri(pictures(1)[0])


@pytest.fixture(scope="module")
def client(runner: asyncio.Runner, in_process_app: tuple[InProcessApp, FastAPI]) -> AppClient:
    return AppClient(runner, in_process_app[1])


def search(client: AppClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/search", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def problem(client: AppClient, **body: Any) -> tuple[int, str, str]:
    answer = client.post("/v1/search", json=body)
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


def as_base64(vector: list[float]) -> str:
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()


def test_a_hits_vector_finds_what_its_id_and_its_image_find(client: AppClient) -> None:
    by_image = search(client, image=URI, k=4, vectors=True)
    first, *others = by_image["data"]
    assert np.linalg.norm(first["vector"]) == pytest.approx(1, abs=1e-5)
    ids = [hit["id"] for hit in by_image["data"]]
    for vector in (first["vector"], [1e200 * each for each in first["vector"]], as_base64(first["vector"])):
        found = search(client, vector=vector, k=4, space=by_image["space"])
        assert [hit["id"] for hit in found["data"]] == ids
    assert "vector" not in found["data"][0]
    assert [hit["id"] for hit in search(client, id=first["id"], k=3)["data"]] == [hit["id"] for hit in others]
    short = search(client, id=first["id"], k=3, vectors=True, encoding_format="base64")["data"]
    assert [hit["vector"] for hit in short] == [as_base64(hit["vector"]) for hit in others]


def test_several_queries_are_answered_in_their_order_as_each_alone(client: AppClient) -> None:
    first = search(client, text="ein roter Kreis", k=3, vectors=True)
    hit = first["data"][0]
    queries = [{"text": "赤い円"}, {"id": hit["id"]}, {"image": URI}, {"vector": hit["vector"]}, {"text": "كلب"}]
    shared = {"k": 3, "space": first["space"], "domain": ["cats"]}
    several = search(client, queries=queries, **shared)
    assert several.keys() == {"object", "model", "space", "results", "next"}
    for query, found in zip(queries, several["results"], strict=True):
        alone = search(client, **query, **shared)["data"]
        assert [each["id"] for each in found["data"]] == [each["id"] for each in alone]
        scores = [each["score"] for each in alone]
        assert [each["score"] for each in found["data"]] == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("k", [1, 2, 4, 100])
def test_pages_end_and_hold_each_hit_once(client: AppClient, k: int) -> None:
    ids: list[list[str]] = [[], []]
    body: dict[str, Any] = {"queries": [{"text": "a cat"}, {"image": URI}], "k": k}
    while True:
        page = search(client, **body)
        for seen, found in zip(ids, page["results"], strict=True):
            seen.extend(hit["id"] for hit in found["data"])
        if (cursor := page["next"]) is None:
            break
        assert len(cursor) < 100
        body["cursor"] = cursor
    assert [len(seen) for seen in ids] == [len(set(seen)) for seen in ids] == [6, 6]


def test_a_cursor_is_of_one_request_and_one_space(client: AppClient) -> None:
    found = search(client, text="a cat", k=2)
    offset, space, asked = found["next"].split("-")
    wrong = (400, "invalid_cursor", "cursor")
    assert problem(client, text="a dog", k=2, cursor=found["next"]) == wrong
    assert problem(client, text="a cat", k=3, cursor=found["next"]) == wrong
    for offset_sent in ("0", "3", "1000", "-2", "²"):
        assert problem(client, text="a cat", k=2, cursor=f"{offset_sent}-{space}-{asked}") == wrong
    gone = f"{offset}-{'0' * len(space)}-{asked}"
    assert problem(client, text="a cat", k=2, cursor=gone) == (409, "space_gone", "space")


def test_what_cannot_be_searched_is_refused_by_its_field(client: AppClient) -> None:
    hit = search(client, text="a cat", k=1, vectors=True)
    vector, space = hit["data"][0]["vector"], hit["space"]
    invalid, vectors = (400, "invalid_value"), {"space": space}
    assert problem(client, vector=vector) == (400, "space_missing", "space")
    assert problem(client, vector=vector, space="another") == (409, "space_gone", "space")
    assert problem(client, text="a cat", space="another") == (409, "space_gone", "space")
    for wrong in ([0.0] * len(vector), vector[1:], as_base64(vector[1:]), []):
        assert problem(client, vector=wrong, **vectors) == (*invalid, "vector" if wrong else "text")
    for wrong in ("no base64", "YWI=", as_base64(vector)[:-3]):
        assert problem(client, vector=wrong, **vectors) == (*invalid, "vector")
    assert problem(client, vector=["1", *vector[1:]], **vectors) == (*invalid, "vector.0")
    assert problem(client, vector=as_base64([float("nan"), *vector[1:]]), **vectors) == (*invalid, "vector.0")
    assert problem(client) == problem(client, text="a", id="f" * 64) == (*invalid, "text")
    assert problem(client, id="f" * 64) == (404, "sample_not_found", "id")
    assert problem(client, id="F" * 64) == (*invalid, "id")
    queries: list[dict[str, Any]] = [{"text": "a"}, {"id": "f" * 64}]
    assert problem(client, queries=queries) == (404, "sample_not_found", "queries.1.id")
    assert problem(client, queries=queries, text="a") == (*invalid, "text")
    assert problem(client, queries=[{"text": "a"}, {}]) == (*invalid, "queries.1.text")
    assert problem(client, queries=[{"text": "a"}, {"image": "b"}]) == (400, "image_format", "queries.1.image")
    assert problem(client, queries=[{"text": "a"}] * 33) == (*invalid, "queries")
    assert problem(client, queries=[{"text": "a", "k": 3}]) == (*invalid, "queries.0.k")
    assert problem(client, queries=[{"text": "x" * 2001}]) == (400, "text_too_long", "queries.0.text")
    assert problem(client, queries=[{"text": "a"}] * 11, k=100, vectors=True) == (400, "too_many_vectors", "vectors")


NUMBERS = st.lists(st.floats() | st.integers() | st.booleans() | st.text(max_size=2) | st.none(), max_size=40)
VECTORS = NUMBERS | st.text(max_size=40) | st.binary(max_size=400).map(lambda data: base64.b64encode(data).decode())
KINDS = st.fixed_dictionaries(
    {}, optional={"text": st.text(max_size=5), "vector": VECTORS, "id": st.text(max_size=70), "image": st.just(URI)}
)
BODIES = st.fixed_dictionaries(
    {}, optional={
        "text": st.text(max_size=5), "vector": VECTORS, "queries": st.lists(KINDS, max_size=4),
        "cursor": st.text(max_size=60), "tags": st.lists(st.text(max_size=9), max_size=3), "vectors": st.booleans(),
        "space": st.text(max_size=12), "k": st.integers(0, 101),
    },
)  # fmt: skip


@given(BODIES)
@settings(max_examples=150, deadline=None)
def test_any_body_is_answered_or_refused_with_its_field(client: AppClient, body: dict[str, Any]) -> None:
    content = json.dumps(body, default=str)  # with numbers beyond 64 bits and NaN, as clients can send them
    answer = client.post("/v1/search", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 404, 409), answer.text


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=600).filter(any))
def test_any_vector_but_zero_is_normalized(vector: list[float]) -> None:
    unit = _unit(vector)
    assert unit.dtype == np.float32 and np.linalg.norm(unit) == pytest.approx(1, abs=1e-5)
