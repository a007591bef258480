"""Requests: their IDs and bodies, the releases that they count for, and the schema of the API."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from core.access import OPERATOR, Principal
from serving.errors import AdapterUnservable, DeadlineExceeded, InvalidRequest, QueueFull, Unavailable
from serving.http.app import openapi
from serving.http.app_state import AppState, routing_key
from serving.http.bodies import MAX_MARKS, check_marks, fields_of
from serving.http.chat import ChatRequest, refuse_unknown
from serving.http.classify import ClassifyRequest, probabilities
from serving.http.embeddings import EmbeddingsRequest
from serving.http.errors import ApiError, from_validation
from serving.http.image_loader import from_data_uri
from serving.http.request_ids import RequestIds, middlewares
from serving.http.search import SearchRequest
from serving.http.vqa import VqaRequest
from serving.releases.types import ReleaseSnapshot
from tests.unit.serving.auth_app import AuthApp
from tests.unit.serving.scripted_vlms import ScriptedVlms, about_image, app_of, app_state, client

CHAT = {"model": "vlm", "messages": [{"role": "user", "content": "hello"}]}
NEW = re.compile(r"[0-9a-f]{32}")


def app_client(vlms: ScriptedVlms | None = None, at: AppState | None = None) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app_of(at or app_state(vlms)), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", CHAT, 200), ("POST", "/v1/chat/completions", {**CHAT, "stream": True}, 200),
        ("POST", "/v1/chat/completions", {"model": "vlm"}, 400),
        ("POST", "/v1/embeddings", {"model": "clip", "input": "a"}, 500),  # there are no encoders here
        ("GET", "/metrics", None, 200), ("GET", "/no/such/route", None, 404), ("GET", "/v1/embeddings", None, 405),
    ],
)  # fmt: skip
async def test_an_answer_has_its_clients_id_once_and_one_without_gets_a_new_one(
    method: str, path: str, body: object, status: int
) -> None:
    async with app_client(ScriptedVlms()) as http:
        own = await http.request(method, path, json=body, headers={"x-request-id": "my-id:1"})
        new = [await http.request(method, path, json=body) for _ in range(2)]
    assert (own.status_code, own.headers.get_list("x-request-id")) == (status, ["my-id:1"])
    ids = [answer.headers["x-request-id"] for answer in new]
    assert all(map(NEW.fullmatch, ids)) and ids[0] != ids[1]


async def test_refusals_before_any_route_have_one_too_and_ids_that_are_not_sane_are_replaced(closed: AuthApp) -> None:
    answers = [await closed.get("/v1/models"), await closed.get("/v1/models", "rk_00000000_0")]
    assert [answer.status_code for answer in answers] == [401, 401]
    async with app_client() as http:
        answers += [
            await http.get("/v1/models", headers=[(b"x-request-id", sent.encode("latin-1"))])
            for sent in ("", "a" * 129, "two words", "<script>", 'a"b', "a;b", "\xe9", "a,b")
        ]
    assert all(NEW.fullmatch(answer.headers["x-request-id"]) for answer in answers)


async def test_around_rays_middleware_there_is_still_one_id_and_it_is_the_sane_one() -> None:
    seen: list[str] = []

    async def rays(scope: Scope, receive: Receive, send: Send) -> None:
        """As ray.serve._private.http_util.RequestIdMiddleware: adds the client's ID again, unchecked."""
        seen.append(dict(scope["headers"])[b"x-request-id"].decode())
        await PlainTextResponse("ok", headers={"X-Request-ID": seen[0]})(scope, receive, send)

    (middleware,) = middlewares()
    assert middleware.cls is RequestIds
    transport = httpx.ASGITransport(RequestIds(rays))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        answer = await http.get("/", headers={"x-request-id": "not sane"})
    assert answer.headers.get_list("x-request-id") == seen
    assert NEW.fullmatch(seen[0])


CANARY = (
    ReleaseSnapshot(4, "clip-a", "i3", "t3", "vlm-c", share=0.3),
    ReleaseSnapshot(3, "clip-a", "i3", "t3", "vlm-b"),
)


def request(caller: Principal | None = None, **headers: str) -> Request:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": raw, "state": {} if caller is None else {"principal": caller}})


def test_a_caller_is_its_api_key_else_what_it_says_of_itself_else_the_request() -> None:
    told = {"authorization": "Bearer secret", "x_ratchet_key": "mine", "x_request_id": "r1"}
    assert routing_key(request(Principal("bot", frozenset(), key_id="0123abcd"), **told), "ann") == "0123abcd"
    assert routing_key(request(OPERATOR, **told), "ann") == "mine"
    del told["x_ratchet_key"]
    assert routing_key(request(OPERATOR, **told), "ann") == "ann"
    assert routing_key(request(Principal("anonymous", frozenset(), "anonymous"), **told)) == "r1"
    assert routing_key(request()) != routing_key(request())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "failed"),
    [
        (None, 0), (AdapterUnservable("gone"), 1), (ApiError(500, "not finite"), 1), (ZeroDivisionError(), 1),
        (Unavailable("no replica"), 0), (DeadlineExceeded("late"), 0), (QueueFull("full"), 0),
        (InvalidRequest("too long"), 0), (ApiError(400, "wrong"), 0),
    ],
)  # fmt: skip
async def test_every_request_is_counted_for_its_release_and_failures_but_for_those_of_clients_and_load(
    stream: bool, failure: Exception | None, failed: int
) -> None:
    at = app_state(ScriptedVlms(failure=failure, fails_at=1))
    async with app_client(at=at) as http:
        await http.post("/v1/chat/completions", json={"messages": about_image(), "stream": stream})
    counted = at.admission.answered()[3]
    assert (counted.requests, counted.failed) == (1, failed)


async def test_openais_user_is_answered_by_one_side_and_the_header_says_which() -> None:
    at = app_state(ScriptedVlms())
    at.admission.adopt(CANARY)
    seen: dict[str, set[str]] = {}
    async with client(at) as http:
        for number in range(60):
            body: dict[str, Any] = {"messages": about_image(), "user": f"user-{number % 20}"}
            answer = await http.post("/v1/chat/completions", json=body)
            told = (answer.headers["x-ratchet-release"], answer.json()["model"], answer.headers["x-ratchet-adapter"])
            assert told in {("4", "vlm@4", "vlm-c"), ("3", "vlm@3", "vlm-b")}
            seen.setdefault(body["user"], set()).add(told[0])
    assert {len(sides) for sides in seen.values()} == {1}
    assert set.union(*seen.values()) == {"3", "4"}


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
        ({"input_typ": "query"}, "input_typ"), ({"encoding_format": "int8"}, "encoding_format"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_embeddings_request_is_named(fields: dict[str, Any], param: str) -> None:
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


SCHEMA = openapi()
FILE = Path(__file__).parents[3] / "docs" / "openapi.json"
ERROR = {"$ref": "#/components/schemas/ErrorBody"}
OPERATIONS = {
    f"{method.upper()} {path}": operation
    for path, item in SCHEMA["paths"].items()
    for method, operation in item.items()
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_each_route_and_each_of_its_answers_is_described_and_has_a_schema(operation: dict[str, Any]) -> None:
    assert operation["summary"] and operation["description"]
    responses = operation["responses"]
    assert any(status.startswith("2") for status in responses)
    for status, response in responses.items():
        assert response["content"], status
        assert all(content.get("schema") for content in response["content"].values()), status
        assert response["description"] not in ("", "Validation Error"), status
    assert responses["4XX"]["content"]["application/json"]["schema"] == ERROR


def test_each_post_has_a_typed_body() -> None:
    posts = {label: operation for label, operation in OPERATIONS.items() if label.startswith("POST")}
    for label, operation in posts.items():
        schemas = {kind: content["schema"] for kind, content in operation["requestBody"]["content"].items()}
        schemas = {kind: schema.get("anyOf", [schema])[0] for kind, schema in schemas.items()}
        assert all(schema["type"] in ("object", "string") for schema in schemas.values()), label
        assert schemas["application/json"]["properties"], label


def test_the_committed_schema_is_the_api_s() -> None:
    assert json.loads(FILE.read_text()) == SCHEMA, "write docs/openapi.json anew: make docs"
