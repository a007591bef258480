"""Images as files of a form, and as the body itself: the same answers as by data URI, the same refusals."""

from __future__ import annotations

import asyncio
import io

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

from ratchet_client import data_uri
from tests.support.in_process_app import AppClient, InProcessApp
from tests.support.inputs import pictures

pytestmark = pytest.mark.integration
PNG = pictures(1)[0]
JPEG_HEADERS = {"content-type": "image/jpeg"}
LABELS = {"labels": ["cat", "dog"], "templates": ["a photo of a {}.", "a {}"]}


def jpeg() -> bytes:
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(PNG)) as image:
        image.convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def client(runner: asyncio.Runner, in_process_app: tuple[InProcessApp, FastAPI]) -> AppClient:
    return AppClient(runner, in_process_app[1])


def vectors(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.array([row["embedding"] for row in answer.json()["data"]], np.float32)


def test_an_image_as_the_body_is_embedded_as_its_data_uri(client: AppClient) -> None:
    by_uri = vectors(client.post("/v1/embeddings", json={"input": {"image": data_uri(jpeg())}}))
    by_body = client.post("/v1/embeddings?model=clip", content=jpeg(), headers=JPEG_HEADERS)
    np.testing.assert_array_equal(vectors(by_body), by_uri)
    query = {"encoding_format": "base64", "model": "clip"}
    encoded = client.post("/v1/embeddings", params=query, content=jpeg(), headers=JPEG_HEADERS)
    assert isinstance(encoded.json()["data"][0]["embedding"], str)


def test_a_form_of_texts_and_files_is_embedded_in_its_order(client: AppClient) -> None:
    parts = [
        ("input", (None, "a cat")), ("input", ("a.jpg", jpeg())), ("model", (None, "clip")), ("input", (None, "a dog")),
    ]  # fmt: skip
    form = client.post("/v1/embeddings", files=parts)
    listed = client.post("/v1/embeddings", json={"input": ["a cat", {"image": data_uri(jpeg())}, "a dog"]})
    np.testing.assert_array_equal(vectors(form), vectors(listed))
    assert form.json()["usage"] == listed.json()["usage"]


def test_classify_and_search_take_an_image_as_the_body(client: AppClient) -> None:
    classified = client.post("/v1/classify", params=LABELS, content=jpeg(), headers=JPEG_HEADERS)
    by_uri = client.post("/v1/classify", json={"images": [data_uri(jpeg())], **LABELS})
    assert classified.json()["data"] == by_uri.json()["data"]
    by_bytes = client.post("/v1/search?k=3&domain=cats", content=PNG, headers={"content-type": "image/png"})
    by_uri = client.post("/v1/search", json={"image": data_uri(PNG), "k": 3, "domain": ["cats"]})
    assert by_bytes.json()["data"] == by_uri.json()["data"]
    assert len(by_bytes.json()["data"]) == 3


def test_vqa_takes_an_image_as_the_body(client: AppClient) -> None:
    answer = client.post(
        "/v1/vqa", params={"question": "what is it?", "choices": ["cat", "dog"]}, content=PNG,
        headers={"content-type": "image/webp"},
    )  # fmt: skip
    assert [row["text"] for row in answer.json()["choices"]] == ["cat", "dog"]


@pytest.mark.parametrize(
    ("path", "content", "param", "code"),
    [
        ("/v1/embeddings", b"no image", "input.0", "image_format"),
        ("/v1/embeddings", b"", "input.0", "image_missing"),
        ("/v1/classify?labels=a", b"no image", "images.0", "image_format"),
        ("/v1/search", b"no image", "image", "image_format"),
        ("/v1/embeddings?dimensions=7", PNG, "dimensions", "unsupported_dimensions"),
        ("/v1/embeddings?what=7", PNG, "what", "invalid_value"),
        ("/v1/classify", PNG, "labels", "invalid_value"),
        ("/v1/search?k=0", PNG, "k", "invalid_value"),
    ],
)
def test_a_refusal_names_its_place(client: AppClient, path: str, content: bytes, param: str, code: str) -> None:
    answer = client.post(path, content=content, headers=JPEG_HEADERS)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)


def test_a_file_in_another_field_is_refused(client: AppClient) -> None:
    answer = client.post("/v1/embeddings", files=[("picture", ("a.png", PNG))])
    assert answer.json()["error"]["code"] == "unknown_field"


def test_what_was_sent_before_is_not_encoded_again(
    client: AppClient, in_process_app: tuple[InProcessApp, FastAPI]
) -> None:
    encoded = in_process_app[0].encoded
    body = {"input": ["a text that no other test has", {"image": data_uri(pictures(9)[8])}]}
    first = client.post("/v1/embeddings", json=body)
    before = dict(encoded)
    again = client.post("/v1/embeddings", json=body)
    assert encoded == before
    assert again.json() == first.json()


@pytest.mark.parametrize(
    ("content", "code"),
    [(b'{"input": ', "invalid_json"), (b'{"input": NaN}', "invalid_value"), (b'["x"]', "invalid_value"),
     (b"", "invalid_json"), (b"\xff", "invalid_json"), (b'{"input": "\\ud800"}', "invalid_json")],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(client: AppClient, content: bytes, code: str) -> None:
    answer = client.post("/v1/embeddings", content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
