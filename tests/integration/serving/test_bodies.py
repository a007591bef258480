"""Bodies over HTTP, with a real CLIP and no Ray: images in every form, hostile images, and errors that name their
place.
"""

from __future__ import annotations

import asyncio
import io
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

from ratchet_client import data_uri
from tests.support.hostile_images import PLAIN, REFUSED, TAKEN, Hostile
from tests.support.in_process_app import MAX_IMAGE_BYTES, AppClient, InProcessApp
from tests.support.inputs import pictures

TOO_MUCH = {"image_too_many_pixels", "image_too_large"}
PNG = pictures(1)[0]
URI = data_uri(PNG)
AS_JPEG = {"headers": {"content-type": "image/jpeg"}}
AS_JSON = {"headers": {"content-type": "application/json"}}
LABELS = {"labels": ["cat", "dog"], "templates": ["a photo of a {}.", "a {}"]}


@pytest.fixture(scope="module")
def client(runner: asyncio.Runner, in_process_app: tuple[InProcessApp, FastAPI]) -> AppClient:
    return AppClient(runner, in_process_app[1])


def vectors(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.array([row["embedding"] for row in answer.json()["data"]], np.float32)


def jpeg() -> bytes:
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(PNG)) as image:
        image.convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def refused(answer: httpx.Response, status: int, code: str, param: str | None) -> None:
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)


@pytest.mark.parametrize("image", [*TAKEN, *REFUSED], ids=lambda image: image.name)
def test_an_odd_image_is_embedded_as_the_plain_one_or_refused_by_every_call(client: AppClient, image: Hostile) -> None:
    uri = data_uri(image.data)
    embedded = client.post("/v1/embeddings", json={"input": ["a text", {"image": uri}]})
    if not image.code and len(image.data) > MAX_IMAGE_BYTES:
        whole = len(uri) > 2 * MAX_IMAGE_BYTES  # more than a body may have
        refused(embedded, 413, *(("body_too_large", None) if whole else ("image_too_large", "input.1.image")))
        return
    file = ("photo.txt", image.data, "text/plain")  # neither its name nor its type is trusted
    chat = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri}}]}]
    answers = {
        "input.1.image": embedded,
        "images.0": client.post("/v1/classify", files={"images": file}, data=LABELS),
        "image": client.post("/v1/search", files={"image": file}),
        "messages.0.content.0.image_url": client.post("/v1/chat/completions", json={"messages": chat}),
    }
    for place, answer in answers.items():
        if image.code:
            refused(answer, 413 if image.code in TOO_MUCH else 400, image.code, place)
            assert answer.json()["error"]["message"].startswith(place)
        else:
            assert answer.status_code == 200, (place, answer.text)
    if not image.code:
        found = vectors(embedded)[1]
        assert np.linalg.norm(found) == pytest.approx(1, abs=1e-3)
        plain = vectors(client.post("/v1/embeddings", json={"input": {"image": data_uri(PLAIN)}}))[0]
        assert not image.same_as_plain or found @ plain > (0.9999 if image.tolerance <= 2 else 0.99)


def test_an_image_as_the_body_or_in_a_form_is_embedded_as_its_data_uri(client: AppClient) -> None:
    uri = {"image": data_uri(jpeg())}
    by_body = client.post("/v1/embeddings?model=clip", content=jpeg(), **AS_JPEG)
    np.testing.assert_array_equal(vectors(by_body), vectors(client.post("/v1/embeddings", json={"input": uri})))
    encoded = client.post("/v1/embeddings?encoding_format=base64", content=jpeg(), **AS_JPEG)
    assert isinstance(encoded.json()["data"][0]["embedding"], str)
    parts = [
        ("input", (None, "a cat")), ("input", ("a.jpg", jpeg())), ("model", (None, "clip")), ("input", (None, "a dog")),
    ]  # fmt: skip
    form = client.post("/v1/embeddings", files=parts)
    listed = client.post("/v1/embeddings", json={"input": ["a cat", uri, "a dog"]})
    np.testing.assert_array_equal(vectors(form), vectors(listed))
    assert form.json()["usage"] == listed.json()["usage"]


def test_the_other_calls_take_an_image_as_the_body_too(client: AppClient) -> None:
    classified = client.post("/v1/classify", params=LABELS, content=jpeg(), **AS_JPEG)
    by_uri = client.post("/v1/classify", json={"images": [data_uri(jpeg())], **LABELS})
    form = client.post("/v1/classify", files=[("images", ("a.jpg", jpeg()))], data=LABELS)
    assert classified.json()["data"] == form.json()["data"] == by_uri.json()["data"]
    [row] = by_uri.json()["data"]
    assert row["label"] in LABELS["labels"] and sum(row["probabilities"].values()) == pytest.approx(1)
    found = client.post("/v1/search?k=3&domain=cats", content=PNG, headers={"content-type": "image/png"})
    by_uri = client.post("/v1/search", json={"image": URI, "k": 3, "domain": ["cats"]})
    assert found.json()["data"] == by_uri.json()["data"]
    assert len(found.json()["data"]) == 3
    asked = {"question": "what is it?", "choices": ["cat", "dog"]}
    answer = client.post("/v1/vqa", params=asked, content=PNG, headers={"content-type": "image/webp"})
    assert [row["text"] for row in answer.json()["choices"]] == ["cat", "dog"]


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("embeddings", b"no image", "image_format", "input.0"),
        ("embeddings", b"", "image_missing", "input.0"),
        ("classify?labels=a", b"no image", "image_format", "images.0"),
        ("search", b"no image", "image_format", "image"),
        ("embeddings?dimensions=7", PNG, "unsupported_dimensions", "dimensions"),
        ("embeddings?what=7", PNG, "invalid_value", "what"),
        ("classify", PNG, "invalid_value", "labels"),
        ("search?k=0", PNG, "invalid_value", "k"),
        ("embeddings", {"model": "clip"}, "invalid_value", "input"),
        ("embeddings", {"input": []}, "invalid_value", "input"),
        ("embeddings", {"input": ""}, "empty_text", "input.0"),
        ("embeddings", {"input": "x" * 2001}, "text_too_long", "input.0"),
        ("embeddings", {"input": ["x"] * 257}, "too_many_texts", "input"),
        ("embeddings", {"input": "x", "dimensions": 7}, "unsupported_dimensions", "dimensions"),
        ("embeddings", {"input": "x", "admin": True}, "invalid_value", "admin"),
        ("embeddings", {"input": {"image": "http://169.254.169.254/"}}, "image_url_off", "input.0.image"),
        ("embeddings", {"input": {"image": "file:///etc/passwd"}}, "image_format", "input.0.image"),
        ("embeddings", {"input": [{"image": URI}] * 33}, "too_many_images", "input"),
        ("classify", {"images": [URI], "labels": []}, "invalid_value", "labels"),
        ("classify", {"images": [URI], "labels": ["a"], "head": "animals"}, "invalid_value", "labels"),
        ("classify", {"images": [URI], "labels": ["a"], "multi_label": True}, "invalid_value", None),
        ("classify", {"images": [URI], "labels": ["a"], "confidence": 0.5}, "invalid_value", None),
        ("classify", {"images": [URI], "head": ""}, "invalid_value", "head"),
        ("search", {"text": "a", "image": "b"}, "invalid_value", "text"),
        ("search", {"text": "a", "k": 100_000}, "invalid_value", "k"),
        ("search", {"text": "a", "since": "9999-12-31T23:59:59Z"}, "invalid_value", "since"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_its_field_or_that_of_an_image_as_the_body(
    client: AppClient, path: str, body: dict[str, Any] | bytes, code: str, param: str | None
) -> None:
    sent = {"content": body, **AS_JPEG} if isinstance(body, bytes) else {"json": body}
    refused(client.post(f"/v1/{path}", **sent), 400, code, param)


@pytest.mark.parametrize(
    ("content", "code", "param"),
    [(b'{"input": ', "invalid_json", None), (b'{"input": NaN}', "invalid_value", "input"),
     (b'["x"]', "invalid_value", None), (b"", "invalid_json", None), (b"\xff", "invalid_json", None),
     (b'{"input": "\\ud800"}', "invalid_json", None), (b"[" * 39_000, "invalid_json", None),
     (b"null", "invalid_value", None)],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(
    client: AppClient, content: bytes, code: str, param: str | None
) -> None:
    refused(client.post("/v1/embeddings", content=content, **AS_JSON), 400, code, param)


def test_fields_routes_methods_and_media_types_that_are_not_there_are_error_objects(client: AppClient) -> None:
    refused(client.post("/v1/embeddings", files=[("picture", ("a.png", PNG))]), 400, "unknown_field", "picture")
    refused(client.post("/v1/nothing", json={}), 404, "not_found", None)
    refused(client.post("/v1/models"), 405, "method_not_allowed", None)
    text = {"content-type": "text/plain"}
    refused(client.post("/v1/embeddings", content=b"x", headers=text), 415, "media_type", None)


def test_what_was_sent_before_is_not_encoded_again(
    client: AppClient, in_process_app: tuple[InProcessApp, FastAPI]
) -> None:
    encoded = in_process_app[0].encoded
    body = {"input": ["a text that no other test has", {"image": data_uri(pictures(9)[8])}]}
    first = client.post("/v1/embeddings", json=body)
    before = dict(encoded)
    assert client.post("/v1/embeddings", json=body).json() == first.json()
    assert encoded == before
