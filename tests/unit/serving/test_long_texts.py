"""A text that is longer than the model reads, over HTTP: cut and named, or refused. A real CLIP answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from core.settings.serving import Serve
from tests.support.in_process_app import AppClient, open_in_process_app
from tests.support.inputs import pictures
from tests.unit.serving.auth_app import refusal
from tests.unit.serving.scripted_vlms import uri

LONG = "the invoice of march lists the following goods: " * 40
LONG_LABEL = "1 " * 100
CUT = "x-ratchet-truncated"
CALLS: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/embeddings", {"input": ["a cat", LONG, {"image": uri(pictures(1)[0])}, "a dog", LONG + "PAID"]}, "input.1"),
    ("/v1/classify", {"images": [uri(pictures(1)[0])], "labels": ["cat", LONG_LABEL]}, "labels.1"),
    ("/v1/search", {"text": LONG}, "text"),
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppClient]:
    with asyncio.Runner() as runner:
        _, app = runner.run(open_in_process_app(tmp_path_factory.mktemp("app"), Serve()))
        yield AppClient(runner, app)


@pytest.mark.parametrize(("path", "body", "place"), CALLS)
def test_a_long_text_is_cut_and_the_answer_says_so(
    client: AppClient, path: str, body: dict[str, Any], place: str
) -> None:
    for asked in (body, {**body, "truncate": True}, body):  # the last one is answered from the cache
        answer = client.post(path, json=asked)
        assert answer.status_code == 200, answer.text
        assert answer.headers[CUT] == ("2" if place == "input.1" else "1")


def test_embeddings_name_the_places_of_long_texts_and_count_what_was_read(client: AppClient) -> None:
    _, body, _ = CALLS[0]
    answer = client.post("/v1/embeddings", json=body).json()
    assert answer["usage"]["truncated"] == [1, 4]
    single = [client.post("/v1/embeddings", json={"input": text}).json() for text in ("a cat", LONG, "a dog")]
    cat, long, dog = (each["usage"]["prompt_tokens"] for each in single)
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == cat + 2 * long + dog
    assert answer["data"][1]["embedding"] == answer["data"][4]["embedding"] == single[1]["data"][0]["embedding"]


@pytest.mark.parametrize(("path", "body", "place"), CALLS)
def test_a_long_text_that_may_not_be_cut_is_refused_and_named(
    client: AppClient, path: str, body: dict[str, Any], place: str
) -> None:
    for _ in range(2):
        answer = client.post(path, json={**body, "truncate": False})
        assert place in refusal(answer, 400, "text_too_long")
        assert answer.json()["error"]["param"] == place
        assert CUT not in answer.headers


@pytest.mark.parametrize("truncate", [True, False])
def test_short_texts_are_answered_without_a_word_about_it(client: AppClient, truncate: bool) -> None:
    for path, body in (("/v1/embeddings", {"input": ["a cat", "a dog"]}), ("/v1/search", {"text": "a cat"})):
        answer = client.post(path, json={**body, "truncate": truncate})
        assert (answer.status_code, CUT in answer.headers) == (200, False)
        assert "truncated" not in answer.json().get("usage", {})
