from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, ValidationError

from serving.http.bodies import MAX_MARKS, check_marks, fields_of, is_empty
from serving.http.chat import ChatRequest, refuse_unknown
from serving.http.classify import ClassifyRequest, probabilities
from serving.http.embeddings import EmbeddingsRequest
from serving.http.errors import ApiError, from_validation
from serving.http.image_loader import from_data_uri
from serving.http.search import SearchRequest
from serving.http.vqa import VqaRequest
from tests.unit.serving.scripted_vlms import ScriptedVlms, app_state, client

IMAGE = "data:image/png;base64,AAAA"
MANY = [1] * 5000
HEADERS = {"content-type": "application/json", "authorization": "Bearer key"}
SHOWN = {"type": "image_url", "image_url": {"url": "data:,"}}


def error_of(model: type[BaseModel], body: dict[str, Any]) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    return from_validation(caught.value)


@pytest.mark.parametrize("tokens", [[1, 2], [[1, 2], [3]], 7])
def test_token_ids_are_refused_in_words(tokens: Any) -> None:
    error = error_of(EmbeddingsRequest, {"input": tokens})
    assert "check_embedding_ctx_length=False" in str(error.detail)
    assert error.param == "input"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ["x", 5]}, "input.1"), ({"input": ["x", None]}, "input.1"), ({"input": ["x", {}]}, "input.1.text"),
        ({"input": ["x", {"image": 5}]}, "input.1.image"), ({"input": {"image": 5}}, "input.0.image"),
        ({"input": ["x", {"image": "data:", "caption": "x"}]}, "input.1.caption"),
        ({"input": ["x", {"type": "image_url", "image_url": {"uri": "data:"}}]}, "input.1.image_url.url"),
        ({"input": ["x", {"type": "text"}]}, "input.1.text"), ({"input": None}, "input"),
        ({"input_type": "query"}, "input_type"), ({"encoding_format": "int8"}, "encoding_format"),
    ],
)  # fmt: skip
def test_what_is_wrong_or_would_change_the_answer_of_an_embeddings_request_is_named(
    fields: dict[str, Any], param: str
) -> None:
    assert error_of(EmbeddingsRequest, {"input": "x"} | fields).param == param


@pytest.mark.parametrize(
    "fields",
    [{"labels": ["cat", "dog", "cat"]}, {"templates": ["no place"]}, {"templates": ["{} and {}"]}, {"templates": []}],
)
def test_labels_must_differ_and_a_template_has_one_place_for_them(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ClassifyRequest.model_validate({"images": ["x"], "labels": ["a"], **fields})


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


def test_probabilities_are_of_the_mean_over_templates() -> None:
    images = np.eye(2, dtype=np.float32)
    prompts = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    shares = probabilities(images, prompts, templates=2, scale=10.0)
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    assert shares[0, 0] == pytest.approx(1 / (1 + np.exp(-10)))


def test_nulls_of_an_embeddings_request_and_inside_of_its_inputs_count_as_left_out() -> None:
    for name in ("encoding_format", "dimensions", "user", "model", "input_type", "timeout"):
        assert EmbeddingsRequest.model_validate({"input": "x", name: None}) == EmbeddingsRequest(input="x")
    shown = {"type": "image_url", "image_url": {"url": IMAGE, "detail": None, "format": None}, "text": None}
    text = {"type": "text", "text": "x", "cache_control": None}
    request = EmbeddingsRequest.model_validate({"input": [shown, text, {"image": IMAGE, "text": None}]})
    assert [type(item).__name__ for item in request.input] == ["ImageUrlItem", "TextItem", "ImageItem"]


@pytest.mark.parametrize("value", [0, False, "x", [None], {"a": 0}, {"a": {}}])
def test_what_has_a_content_is_not_empty(value: Any) -> None:
    assert not is_empty(value)


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
    "value", ['commas, [brackets] {braces} and "quotes" \\' * 2000, SHOWN], ids=["punctuation", "the longest list"]
)
def test_what_texts_hold_does_not_count(value: Any) -> None:
    body = {"input": [value] * (8192 if value is SHOWN else 8)}
    check_marks(json.dumps(body).encode())
    EmbeddingsRequest.model_validate(body)


def test_an_unknown_key_is_shown_cut() -> None:
    error = error_of(ClassifyRequest, {"images": ["x"], "labels": ["x"], "k" * 100_000: 1})
    assert error.param == "k" * 80
    assert len(str(error.detail)) < 300


def test_of_the_fields_of_a_chat_that_change_nothing_only_who_asks_is_kept() -> None:
    shape = [[{}] * 1000]
    ignored = dict.fromkeys(["metadata", "store", "prompt_cache_options", "safety_identifier"], shape)
    for user, kept in (("me", {"user": "me"}), (shape, {})):
        message = {"role": "user", "content": "x", "name": shape}
        body = ChatRequest.model_validate({"messages": [message], "user": user, **ignored})
        refuse_unknown(body)
        assert (body.model_extra, body.messages[0].model_extra) == (kept, {})
