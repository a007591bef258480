"""Schemas, data URIs, authentication, bounds and probabilities, without a server."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import ValidationError
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from serving.http.classify import probabilities
from serving.http.errors import ApiError, from_validation
from serving.http.image_loader import from_data_uri
from serving.http.limits import RequestLimits
from serving.http.schemas import ClassifyRequest, EmbeddingsRequest
from serving.ray.haproxy import close_binds


@pytest.mark.parametrize("tokens", [[1, 2], [[1, 2], [3]], 7])
def test_token_ids_are_refused_in_words(tokens: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        EmbeddingsRequest.model_validate({"input": tokens})
    error = from_validation(caught.value)
    assert "token ids are not taken" in str(error.detail)
    assert error.param == "input"


def test_one_input_and_a_list_are_the_same() -> None:
    assert EmbeddingsRequest.model_validate({"input": "x"}).items() == ["x"]
    mixed = EmbeddingsRequest.model_validate({"input": ["x", {"image": "data:"}, {"type": "text", "text": "y"}]})
    assert len(mixed.items()) == 3


def test_a_template_needs_one_place_for_the_label() -> None:
    for templates in (["no place"], ["{} and {}"], []):
        with pytest.raises(ValidationError):
            ClassifyRequest.model_validate({"images": ["x"], "labels": ["a"], "templates": templates})


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("file:///etc/passwd", "image_format"),
        ("data:image/png,abc", "image_format"),
        ("data:image/png;base64,@@@@", "image_format"),
        ("data:image/png;base64," + "A" * 2000, "image_too_large"),
    ],
)
def test_only_data_uris_within_bounds_are_taken(uri: str, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        from_data_uri(uri, "input.0", max_bytes=1000)
    assert caught.value.code == code


def test_a_data_uri_gives_its_bytes() -> None:
    assert from_data_uri("data:image/png;base64," + base64.b64encode(b"abc").decode(), "x", 10) == b"abc"


def test_probabilities_are_of_the_mean_over_templates() -> None:
    images = np.eye(2, dtype=np.float32)
    prompts = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    shares = probabilities(images, prompts, templates=2, scale=10.0)
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    assert shares[0, 0] == pytest.approx(1 / (1 + np.exp(-10)))


def test_haproxy_pages_become_loopback_and_named_binds_stay() -> None:
    text = "  bind *:8404\n    bind :9101\n    bind 0.0.0.0:8000\n    bind 127.0.0.1:80\n"
    assert (
        close_binds(text)
        == "  bind 127.0.0.1:8404\n    bind 127.0.0.1:9101\n    bind 0.0.0.0:8000\n    bind 127.0.0.1:80\n"
    )


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    await PlainTextResponse(str(size))(scope, receive, send)


def client(peer: str = "127.0.0.1", loopback_only: bool = True, requests: int = 10) -> httpx.AsyncClient:
    app = RequestLimits(echo, max_body_bytes=100, max_requests=requests, loopback_only=loopback_only)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, client=(peer, 1)), base_url="http://x")


async def test_a_body_is_counted_with_and_without_a_length() -> None:
    async def chunks() -> Any:
        for _ in range(20):
            yield b"x" * 10

    async with client() as http:
        assert (await http.post("/", content=b"x" * 100)).text == "100"
        declared = await http.post("/", content=b"x" * 101)
        streamed = await http.post("/", content=chunks())
    assert declared.status_code == streamed.status_code == 413
    assert declared.json()["error"]["code"] == streamed.json()["error"]["code"] == "body_too_large"


async def test_other_machines_are_refused_when_the_host_is_loopback() -> None:
    async with client(peer="203.0.113.9") as http:
        assert (await http.get("/")).status_code == 403
    async with client(peer="203.0.113.9", loopback_only=False) as http:
        assert (await http.get("/")).status_code == 200


async def test_requests_over_the_bound_are_told_when_to_come_back() -> None:
    async with client(requests=0) as http:
        full = await http.get("/v1/models")
        health = await http.get("/health/live")
    assert full.status_code == 429
    assert full.headers["retry-after"] == "1"
    assert health.status_code == 200
