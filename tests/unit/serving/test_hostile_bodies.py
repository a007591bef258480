"""Bodies that cost little to send and much to check."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from serving.http.bodies import MAX_MARKS, check_marks, fields_of
from serving.http.chat import ChatRequest, refuse_unknown
from serving.http.classify import ClassifyRequest
from serving.http.embeddings import EmbeddingsRequest
from serving.http.errors import ApiError, from_validation
from serving.http.search import SearchRequest
from serving.http.vqa import VqaRequest
from tests.unit.serving.scripted_vlms import ScriptedVlms, app_state, client

MANY = [1] * 5000
HEADERS = {"content-type": "application/json", "authorization": "Bearer key"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (ClassifyRequest, {"images": ["x"], "labels": MANY}),
        (ClassifyRequest, {"images": MANY, "labels": ["x"]}),
        (ClassifyRequest, {"images": ["x"], "labels": ["x"], "templates": MANY}),
        (EmbeddingsRequest, {"input": ["x", *MANY]}),
        (EmbeddingsRequest, {"input": [{"image": 1}] * 5000}),
        (VqaRequest, {"image": "x", "question": "x", "choices": MANY}),
        (SearchRequest, {"text": "x", "domain": MANY}),
        (SearchRequest, {"text": "x", "source": MANY}),
        (ChatRequest, {"messages": MANY}),
        (ChatRequest, {"messages": [{"role": "user", "content": MANY}]}),
        (ChatRequest, {"messages": [{"role": "user", "content": "x"}], "stop": MANY}),
    ],
)
def test_a_list_of_wrong_elements_is_refused_at_the_first_one(model: type[BaseModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate_json(json.dumps(body))
    assert caught.value.error_count() < 10


@pytest.mark.parametrize(
    "body",
    [
        b'{"images":["x"],"labels":[' + b"1," * MAX_MARKS + b"1]}",
        b"{" + b",".join(b'"%d":1' % number for number in range(MAX_MARKS + 2)) + b"}",
        b'{"metadata":' + b"[" * (MAX_MARKS + 1),
        b'{"metadata":[' + b"{}," * MAX_MARKS + b"{}]}",
        b"[" + b'"\\\\",' * (MAX_MARKS + 1) + b'""]',
        b'"' * (5 * MAX_MARKS) + b"," * (MAX_MARKS + 1),
    ],
    ids=["elements", "keys", "nested", "objects", "after escaped backslashes", "quotes"],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings", "/v1/classify", "/admin/v1/hold"])
async def test_a_body_of_more_values_than_any_request_has_is_refused_before_parsing(path: str, body: bytes) -> None:
    async with client(app_state(ScriptedVlms())) as http:
        answer = await http.post(path, content=body, headers=HEADERS)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_many_values")


def test_a_form_s_list_of_more_values_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(ApiError, match="values"):
        fields_of([("labels", json.dumps([1] * MAX_MARKS * 2))], {"labels"})


@pytest.mark.parametrize(
    "body",
    [
        {"input": ['commas, [brackets] {braces} and "quotes" \\' * 2000] * 8},
        {"input": [IMAGE] * 8192},
    ],
    ids=["punctuation", "the longest list"],
)
def test_what_texts_hold_does_not_count(body: dict[str, Any]) -> None:
    check_marks(json.dumps(body).encode())
    EmbeddingsRequest.model_validate(body)


def test_an_unknown_key_is_shown_cut() -> None:
    with pytest.raises(ValidationError) as caught:
        ClassifyRequest.model_validate({"images": ["x"], "labels": ["x"], "k" * 100_000: 1})
    error = from_validation(caught.value)
    assert error.param == "k" * 80
    assert len(str(error.detail)) < 300


@pytest.mark.parametrize("name", ["metadata", "store", "prompt_cache_options", "user", "safety_identifier"])
def test_fields_of_a_chat_that_change_nothing_are_not_kept(name: str) -> None:
    shape = [[{}] * 1000]
    message = {"role": "user", "content": "x", "name": shape}
    body = ChatRequest.model_validate({"messages": [message], name: shape})
    refuse_unknown(body)
    assert body.model_extra == {}
    assert body.messages[0].model_extra == {}


def test_who_asks_is_kept_of_a_chat() -> None:
    body = ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}], "user": "me", "metadata": {}})
    refuse_unknown(body)
    assert body.caller == "me"
