"""Hostile images over HTTP: each gets the right answer, or a refusal with its place and its code."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from fastapi import FastAPI

from ratchet_client import data_uri
from tests.support.hostile_images import PLAIN, REFUSED, TAKEN, Hostile
from tests.support.in_process_app import MAX_IMAGE_BYTES, AppClient, InProcessApp

pytestmark = pytest.mark.integration
SMALL = [image for image in TAKEN if len(image.data) <= MAX_IMAGE_BYTES]
LARGE = [image for image in TAKEN if len(image.data) > MAX_IMAGE_BYTES]
TOO_MUCH = {"image_too_many_pixels", "image_too_large"}


class Client(AppClient):
    def embed(self, image: bytes) -> np.ndarray:
        answer = self.post("/v1/embeddings", json={"input": {"image": data_uri(image)}})
        assert answer.status_code == 200, answer.text
        return np.array(answer.json()["data"][0]["embedding"], np.float32)


@pytest.fixture(scope="module")
def client(runner: asyncio.Runner, in_process_app: tuple[InProcessApp, FastAPI]) -> Client:
    return Client(runner, in_process_app[1])


@pytest.mark.parametrize("image", SMALL, ids=[each.name for each in SMALL])
def test_an_odd_image_is_embedded_as_the_plain_one(client: Client, image: Hostile) -> None:
    found = client.embed(image.data)
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-3)
    if image.same_as_plain:
        assert found @ client.embed(PLAIN) > (0.9999 if image.tolerance <= 2 else 0.99)


@pytest.mark.parametrize("image", SMALL, ids=[each.name for each in SMALL])
def test_every_call_takes_it(client: Client, image: Hostile) -> None:
    file = ("photo.txt", image.data, "text/plain")  # neither its name nor its type is believed
    answers = [
        client.post("/v1/classify", files={"images": file}, data={"labels": ["a", "b"]}),
        client.post("/v1/search", files={"image": file}),
        client.post("/v1/vqa", files={"image": file}, data={"question": "what is it?"}),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 200]


@pytest.mark.parametrize("image", LARGE, ids=[each.name for each in LARGE])
def test_one_that_is_larger_than_the_bound_is_refused_by_its_size(client: Client, image: Hostile) -> None:
    answer = client.post("/v1/embeddings", json={"input": {"image": data_uri(image.data)}})
    assert answer.status_code == 413, answer.text


@pytest.mark.parametrize("image", REFUSED, ids=[each.name for each in REFUSED])
def test_what_is_no_acceptable_image_is_refused_by_every_call(client: Client, image: Hostile) -> None:
    uri = data_uri(image.data)
    chat = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri}}]}]
    answers = {
        "input.1.image": client.post("/v1/embeddings", json={"input": ["a text", {"image": uri}]}),
        "images.0": client.post("/v1/classify", json={"images": [uri], "labels": ["a"]}),
        "image": client.post("/v1/search", files={"image": ("a.png", image.data, "image/png")}),
        "messages.0.content.0.image_url": client.post("/v1/chat/completions", json={"messages": chat}),
    }
    for place, answer in answers.items():
        error = answer.json()["error"]
        assert answer.status_code == (413 if image.code in TOO_MUCH else 400)
        assert (error["code"], error["param"]) == (image.code, place)
        assert error["message"].startswith(place)
