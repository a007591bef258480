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

pytestmark = pytest.mark.integration
SMALL = [image for image in TAKEN if len(image.data) <= MAX_IMAGE_BYTES]
LARGE = [image for image in TAKEN if len(image.data) > MAX_IMAGE_BYTES]
TOO_MUCH = {"image_too_many_pixels", "image_too_large"}


@pytest.fixture(scope="module")
def client(runner: asyncio.Runner, in_process_app: tuple[InProcessApp, FastAPI]) -> AppClient:
    return AppClient(runner, in_process_app[1])


def named(images: list[Hostile]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("image", images, ids=[each.name for each in images])


def embedded(client: AppClient, image: bytes) -> np.ndarray:
    return vectors(client.post("/v1/embeddings", json={"input": {"image": data_uri(image)}}))[0]


@named(SMALL)
def test_an_odd_image_is_taken_by_every_call_and_embedded_as_the_plain_one(client: AppClient, image: Hostile) -> None:
    found = embedded(client, image.data)
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-3)
    if image.same_as_plain:
        assert found @ embedded(client, PLAIN) > (0.9999 if image.tolerance <= 2 else 0.99)
    file = ("photo.txt", image.data, "text/plain")  # neither its name nor its type is trusted
    answers = [
        client.post("/v1/classify", files={"images": file}, data={"labels": ["a", "b"]}),
        client.post("/v1/search", files={"image": file}),
        client.post("/v1/vqa", files={"image": file}, data={"question": "what is it?"}),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 200]


@named(LARGE)
def test_one_that_is_larger_than_the_bound_is_refused_by_its_size(client: AppClient, image: Hostile) -> None:
    answer = client.post("/v1/embeddings", json={"input": {"image": data_uri(image.data)}})
    assert answer.status_code == 413, answer.text


@named(REFUSED)
def test_what_is_no_acceptable_image_is_refused_by_every_call(client: AppClient, image: Hostile) -> None:
    uri = data_uri(image.data)
    chat = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri}}]}]
    answers = {
        "input.1.image": client.post("/v1/embeddings", json={"input": ["a text", {"image": uri}]}),
        "images.0": client.post("/v1/classify", json={"images": [uri], "labels": ["a"]}),
        "image": client.post("/v1/search", files={"image": ("a.png", image.data, "image/png")}),
        "messages.0.content.0.image_url": client.post("/v1/chat/completions", json={"messages": chat}),
    }
    for place, answer in answers.items():
        refused(answer, 413 if image.code in TOO_MUCH else 400, image.code, place)
        assert answer.json()["error"]["message"].startswith(place)


PNG = pictures(1)[0]
JPEG_HEADERS = {"content-type": "image/jpeg"}
LABELS = {"labels": ["cat", "dog"], "templates": ["a photo of a {}.", "a {}"]}


def jpeg() -> bytes:
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(PNG)) as image:
        image.convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


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
    form = client.post("/v1/classify", files=[("images", ("a.jpg", jpeg()))], data=LABELS)
    assert classified.json()["data"] == form.json()["data"] == by_uri.json()["data"]
    [row] = by_uri.json()["data"]
    assert row["label"] in LABELS["labels"] and sum(row["probabilities"].values()) == pytest.approx(1)
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
def test_a_refusal_of_an_image_body_names_its_place(
    client: AppClient, path: str, content: bytes, param: str, code: str
) -> None:
    refused(client.post(path, content=content, headers=JPEG_HEADERS), 400, code, param)


def test_a_file_in_another_field_is_refused(client: AppClient) -> None:
    refused(client.post("/v1/embeddings", files=[("picture", ("a.png", PNG))]), 400, "unknown_field", "picture")


def refused(answer: httpx.Response, status: int, code: str, param: str | None) -> None:
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)


IMAGES = {"images": [data_uri(PNG)]}


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("embeddings", {"model": "clip"}, "invalid_value", "input"),
        ("embeddings", {"input": []}, "invalid_value", "input"),
        ("embeddings", {"input": ""}, "empty_text", "input.0"),
        ("embeddings", {"input": "x" * 2001}, "text_too_long", "input.0"),
        ("embeddings", {"input": ["x"] * 257}, "too_many_texts", "input"),
        ("embeddings", {"input": "x", "dimensions": 7}, "unsupported_dimensions", "dimensions"),
        ("embeddings", {"input": "x", "admin": True}, "invalid_value", "admin"),
        ("embeddings", {"input": {"image": "http://169.254.169.254/"}}, "image_url_off", "input.0.image"),
        ("embeddings", {"input": {"image": "file:///etc/passwd"}}, "image_format", "input.0.image"),
        ("embeddings", {"input": [{"image": data_uri(PNG)}] * 33}, "too_many_images", "input"),
        ("classify", {**IMAGES, "labels": []}, "invalid_value", "labels"),
        ("classify", IMAGES, "invalid_value", "labels"),
        ("classify", {**IMAGES, "labels": ["a"], "head": "animals"}, "invalid_value", "labels"),
        ("classify", {**IMAGES, "labels": ["a"], "multi_label": True}, "invalid_value", None),
        ("classify", {**IMAGES, "labels": ["a"], "confidence": 0.5}, "invalid_value", None),
        ("classify", {**IMAGES, "head": ""}, "invalid_value", "head"),
        ("search", {"text": "a", "image": "b"}, "invalid_value", "text"),
        ("search", {"text": "a", "k": 100_000}, "invalid_value", "k"),
        ("search", {"text": "a", "since": "9999-12-31T23:59:59Z"}, "invalid_value", "since"),
    ],
)
def test_a_body_that_cannot_be_answered_is_refused_by_its_field(
    client: AppClient, path: str, body: dict[str, Any], code: str, param: str | None
) -> None:
    refused(client.post(f"/v1/{path}", json=body), 400, code, param)


def test_routes_methods_and_media_types_that_are_not_there_are_error_objects(client: AppClient) -> None:
    refused(client.post("/v1/nothing", json={}), 404, "not_found", None)
    refused(client.post("/v1/models"), 405, "method_not_allowed", None)
    refused(
        client.post("/v1/embeddings", content=b"x", headers={"content-type": "text/plain"}), 415, "media_type", None
    )


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
     (b"", "invalid_json"), (b"\xff", "invalid_json"), (b'{"input": "\\ud800"}', "invalid_json"),
     (b"[" * 39_000, "invalid_json"), (b"null", "invalid_value")],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(client: AppClient, content: bytes, code: str) -> None:
    answer = client.post("/v1/embeddings", content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
