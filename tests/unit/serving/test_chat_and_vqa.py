"""Chat and VQA over the real application; the model is scripted."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.settings.serving import Serve
from serving.engines.vlm.generation import MAX_IMAGES, Finish, Message, TokenChunk
from serving.errors import DeadlineExceeded, EngineDead, InvalidRequest, QueueFull, Unavailable
from serving.http.app_state import AppState
from serving.http.chat import chunk_events
from serving.http.chunks import ChatCompletion, dumps, event
from serving.http.errors import ApiError
from serving.http.vqa import normalised
from serving.releases.types import ReleaseSnapshot
from tests.unit.serving.scripted_vlms import (
    SETTINGS,
    RawRequest,
    ScriptedVlms,
    about_image,
    app_of,
    app_state,
    client,
    png,
    skip,
    uri,
)

CHAT, VQA = "/v1/chat/completions", "/v1/vqa"
QUESTION = {"image": uri(), "question": "what is this?"}
STREAM = {"messages": about_image(), "stream": True}
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": about_image()}), "stream": (CHAT, STREAM), "vqa": (VQA, QUESTION),
}  # fmt: skip
each_call = pytest.mark.parametrize(("path", "body"), CALLS.values(), ids=CALLS)
PIXELS = 6 * 4


async def post(vlms: ScriptedVlms | None, body: Any, path: str = CHAT, settings: Serve = SETTINGS) -> Any:
    async with client(app_state(vlms, settings)) as http:
        return await http.post(path, json=body)


def visit(vlms: ScriptedVlms, body: Any, path: str = CHAT, **settings: Any) -> tuple[AppState, RawRequest]:
    at = app_state(vlms, SETTINGS.model_copy(update=settings))
    return at, RawRequest(app_of(at), path, json.dumps(body).encode())


def kept(at: AppState) -> tuple[dict[int, int], int]:
    """What is held for requests: those in flight by release, and pixels."""
    return at.admission.in_flight(), at.image_loader.queue.pixels


async def test_an_answer_is_openais_object_names_its_release_and_is_greedy() -> None:
    vlms = ScriptedVlms()
    answer = await post(vlms, {"model": "vlm", "messages": about_image()})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["object"], body["model"]) == ("chat.completion", "vlm@3")
    assert body["system_fingerprint"] == answer.headers["x-ratchet-adapter"] == "vlm-b"
    assert answer.headers["x-ratchet-release"] == "3"
    message = {"role": "assistant", "content": "a red bus", "refusal": None}
    assert body["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    ask, _ = vlms.asked[0]  # greedy, and as long as allowed
    assert (ask.max_tokens, ask.temperature, ask.top_p, ask.seed, ask.stop) == (32, 0.0, 1.0, None, ())
    scored = await post(vlms, {"messages": about_image(), "logprobs": True, "top_logprobs": 0})
    rows = scored.json()["choices"][0]["logprobs"]["content"]
    assert [row["logprob"] for row in rows] == [0.0, -0.5, -1.0]
    assert rows[1] == {"token": "<1>", "logprob": -0.5, "bytes": list(b"<1>"), "top_logprobs": []}


async def test_an_answer_has_at_most_as_many_tokens_as_the_server_allows_whatever_is_asked_for() -> None:
    vlms = ScriptedVlms(finish="length")
    for name in ("max_tokens", "max_completion_tokens"):
        answer = await post(vlms, {"messages": about_image(), name: 1000})
        assert answer.json()["choices"][0]["finish_reason"] == "length"
    assert [ask.max_tokens for ask, _ in vlms.asked] == [32, 32]


async def test_several_answers_have_seeds_of_their_own_and_count_the_prompt_once() -> None:
    vlms = ScriptedVlms()
    answer = await post(vlms, {"messages": about_image(), "n": 3, "temperature": 1, "seed": -1})
    body = answer.json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in body["choices"]} == {"a red bus"}
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}
    assert sorted(ask.seed or 0 for ask, _ in vlms.asked) == [0, 1, 2**63 - 1]


async def test_a_schema_goes_to_the_engine_and_one_that_cannot_says_so_by_the_field() -> None:
    vlms, schema = ScriptedVlms(), {"type": "object", "properties": {"colour": {"type": "string"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "c", "strict": True, "schema": schema}}
    for form in (wanted, {"type": "json_object"}, {"type": "text"}, None):
        assert (await post(vlms, {"messages": about_image(), "response_format": form})).status_code == 200
    asked = [ask.json_schema for ask, _ in vlms.asked]
    assert [text and json.loads(text) for text in asked] == [schema, {"type": "object"}, "", ""]
    vlms.failure = InvalidRequest("this engine cannot.", "Leave it out.", "response_format")
    refused = await post(vlms, {"messages": about_image(), "response_format": wanted})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "response_format")


EMPTY = {"refusal": None, "annotations": [], "provider_specific_fields": {"refusal": None}, "reasoning_content": ""}


async def test_the_model_gets_texts_images_and_how_to_answer() -> None:
    vlms = ScriptedVlms()
    messages = [
        {"role": "developer", "content": "be short", "name": "ann"}, *about_image("one", uri(png(6, 4))),
        {"role": "assistant", "content": "1", **EMPTY}, *about_image("two", uri(png(3, 5))),
    ]  # fmt: skip
    how = {"max_completion_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": -4, "stop": "."}
    answer = await post(vlms, {"messages": messages, **how})
    assert answer.status_code == 200, answer.text
    ask, snapshot = vlms.asked[0]
    assert ask.messages == (
        Message("system", ("be short",)), Message("user", (0, "one")), Message("assistant", ("1",)),
        Message("user", (1, "two")),
    )  # fmt: skip
    assert [image.shape for image in ask.images] == [(4, 6, 3), (5, 3, 3)]
    assert (ask.images[0] == np.array([200, 30, 30], np.uint8)).all()
    assert (ask.max_tokens, ask.temperature, ask.top_p, ask.seed, ask.stop) == (9, 0.5, 0.9, 2**63 - 4, (".",))
    assert snapshot.vlm == "vlm-b"


HARMLESS = {
    "user": "ann", "metadata": {"a": "b"}, "n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "store": False,
    "response_format": {"type": "text"}, "tool_choice": "none", "logit_bias": {}, "logprobs": False, "top_k": -1,
    "ignore_eos": False, "stream": False, "parallel_tool_calls": True, "service_tier": "auto",
    "reasoning_effort": "none", "verbosity": "medium",
}  # fmt: skip
NULLS = dict.fromkeys(
    ["model", "n", "tools", "reasoning_effort", "stream_options", "stop", "seed", "temperature", "top_p", "max_tokens",
     "audio", "what_comes_next_year"]
)  # fmt: skip
PARTS = [
    {"type": "image_url", "image_url": {"url": uri(), "detail": None, "format": None}, "text": None},
    {"type": "text", "text": "what is this?", "image_url": None, "cache_control": None},
]


async def test_fields_that_change_nothing_and_nulls_anywhere_are_taken() -> None:
    vlms = ScriptedVlms()
    for fields in ({}, HARMLESS, NULLS, {"messages": [{"role": "user", "content": PARTS, "tool_calls": None}]}):
        answer = await post(vlms, {"messages": about_image(), **fields})
        assert answer.status_code == 200, answer.text
    plain, *same = [replace(ask, images=()) for ask, _ in vlms.asked]
    assert same == [plain] * 3


def said(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **more}]}


REFUSED_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function"}]}, "tools"), ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"), ({"n": 2}, "n"),
    ({"response_format": {"type": "xml"}}, "response_format.type"), ({"n": 9, "temperature": 1}, "n"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"title": "x" * 16_384}}}},
     "response_format.json_schema.schema"), ({"n": 2, "temperature": 1, "stream": True}, "n"),
    ({"presence_penalty": 0.5}, "presence_penalty"), ({"audio": {}}, "audio"), ({"wat": 1}, "wat"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"), ({"max_tokens": 0}, "max_tokens"),
    ({"temperature": 2.1}, "temperature"), ({"temperature": -0.1}, "temperature"), ({"top_p": 0}, "top_p"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"), ({"stop": ""}, "stop"), ({"stop": [""]}, "stop"),
    ({"seed": 2**63}, "seed"), ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": []}, "messages"), (said(""), "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"), (said(None), "messages.0.content"),
    (said("x", tool_calls=[{}]), "messages.0.tool_calls"), (said("x" * 2001), "messages.0.content.0"),
    (said([{"type": "input_audio"}]), "messages.0.content.0.type"),
    (said([{"type": "text"}]), "messages.0.content.0"),
    ({"messages": [{**about_image()[0], "role": "system"}]}, "messages.0.content.0"),
    ({"messages": about_image(image="https://example.org/a.png")}, "messages.0.content.0.image_url"),
    ({"messages": about_image(image="data:image/png;base64,AAAA")}, "messages.0.content.0.image_url"),
    ({"messages": about_image() * (MAX_IMAGES + 1)}, "messages"),
]  # fmt: skip
REFUSED_QUESTIONS: list[tuple[dict[str, Any], str]] = [
    ({"choices": ["yes"]}, "choices"), ({"choices": ["yes", "yes "]}, "choices"), ({"choices": ["", "a"]}, "choices"),
    ({"choices": [str(n) for n in range(17)]}, "choices"), ({"question": ""}, "question"), ({"tools": []}, "tools"),
    ({"question": "x" * 2001}, "question"), ({"image": "https://x/a.png"}, "image"), ({"image": None}, "image"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "extra", "param"),
    [*(("chat", *row) for row in REFUSED_CHATS), *(("vqa", *row) for row in REFUSED_QUESTIONS)],
)
async def test_what_cannot_be_honoured_is_refused_by_name(call: str, extra: dict[str, Any], param: str) -> None:
    vlms, (path, body) = ScriptedVlms(), CALLS[call]
    answer = await post(vlms, body | extra, path)
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert (error["param"] or "").startswith(param), error
    assert error["type"] == "invalid_request_error"
    assert param.split(".")[0] in error["message"]
    assert vlms.asked == []


@each_call
async def test_a_model_that_is_not_served_is_told_with_what_is_or_the_fix(path: str, body: dict[str, Any]) -> None:
    for vlms, code, told in (
        (ScriptedVlms(), "model_not_found", "vlm, vlm@3, vlm@2, vlm-b, base"), (None, "no_vlm", "base.vlm"),
    ):  # fmt: skip
        answer = await post(vlms, {**body, "model": "clip"}, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, code)
        assert told in answer.json()["error"]["message"]


@each_call
@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (QueueFull("full."), 429, "overloaded"), (DeadlineExceeded("late."), 504, "deadline_exceeded"),
        (Unavailable("down."), 503, "unavailable"), (EngineDead("dead."), 503, "unavailable"),
        (InvalidRequest("too long."), 400, "invalid_request"),
    ],
)  # fmt: skip
async def test_a_failure_before_the_first_chunk_is_a_status(
    failure: Exception, status: int, code: str, path: str, body: dict[str, Any]
) -> None:
    at = app_state(ScriptedVlms(failure=failure))
    async with client(at) as http:
        answer = await http.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    assert kept(at) == ({}, 0)


@each_call
async def test_the_deadline_holds_for_the_first_chunk_too(path: str, body: dict[str, Any]) -> None:
    vlms = ScriptedVlms(hangs_at=0)
    asking = asyncio.create_task(post(vlms, body, path, SETTINGS.model_copy(update={"deadline_seconds": 3600})))
    await vlms.waiting.wait()
    skip(3600)
    answer = await asking
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert vlms.closed == 1


@each_call
async def test_a_client_that_hangs_up_before_the_first_chunk_aborts_it(path: str, body: dict[str, Any]) -> None:
    vlms = ScriptedVlms(hangs_at=0)
    at, visitor = visit(vlms, body, path)
    await vlms.waiting.wait()
    assert kept(at) == ({3: 1}, PIXELS)
    visitor.hang_up()
    await asyncio.wait_for(visitor.task, 5)
    assert (vlms.closed, kept(at)) == (1, ({}, 0))
    assert visitor.sent[0]["status"] == 499
    vlms.hangs_at = None
    async with client(at) as http:
        assert (await http.post(path, json=body)).status_code == 200
    assert kept(at) == ({}, 0)


@pytest.mark.parametrize("gone", [False, True])
async def test_a_server_that_cancels_a_request_aborts_it_and_is_obeyed(gone: bool) -> None:
    vlms = ScriptedVlms(hangs_at=0)
    at, visitor = visit(vlms, {"messages": about_image()})
    await vlms.waiting.wait()
    if gone:  # Ray tells of a client that left, and cancels at the same time
        visitor.hang_up()
    visitor.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await visitor.task
    assert (vlms.closed, kept(at)) == (1, ({}, 0))


async def test_models_are_listed_with_their_family() -> None:
    async with client(app_state(ScriptedVlms())) as http:
        rows = {row["id"]: row for row in (await http.get("/v1/models")).json()["data"]}
        one = (await http.get("/v1/models/vlm@2")).json()
    assert rows["vlm"] == {
        "id": "vlm", "object": "model", "created": 0, "owned_by": "ratchet", "family": "vlm", "release": 3,
        "adapter": "vlm-b",
    }  # fmt: skip
    assert rows["clip"]["family"] == rows["clip-a"]["family"] == "clip"
    assert one["adapter"] == "base"
    async with client(app_state(None)) as http:
        assert {row["family"] for row in (await http.get("/v1/models")).json()["data"]} == {"clip"}


SNAPSHOT = ReleaseSnapshot(3, None, "i", "t", "vlm-b")


def events(text: str) -> list[tuple[str, str]]:
    """(event, data) pairs, read as the standard says: lines end with \\n only here, an empty line ends an event."""
    found = []
    for block in text.split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((lines.get("event", ""), lines["data"]))
    return found


def objects(text: str) -> list[Any]:
    return [json.loads(data) for _, data in events(text) if data != "[DONE]"]


async def test_a_stream_has_the_role_then_the_text_then_why_it_ended_and_its_usage_if_asked() -> None:
    nulls = {"include_usage": None, "include_obfuscation": None}
    answer = await post(ScriptedVlms(), {**STREAM, "stream_options": nulls})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    assert (answer.headers["x-ratchet-release"], answer.headers["x-ratchet-adapter"]) == ("3", "vlm-b")
    assert events(answer.text)[-1] == ("", "[DONE]")
    parts = objects(answer.text)
    assert [part["choices"][0]["delta"] for part in parts] == [
        {"role": "assistant", "content": ""}, {"content": "a "}, {"content": "red "}, {"content": "bus"}, {},
    ]  # fmt: skip
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None] * 4 + ["stop"]
    assert {(part["id"], part["created"], part["model"], part["object"]) for part in parts} == {
        (parts[0]["id"], parts[0]["created"], "vlm@3", "chat.completion.chunk")
    }
    assert all("usage" not in part for part in parts)
    scored = {**STREAM, "logprobs": True, "stream_options": {"include_usage": True}}
    *parts, last = objects((await post(ScriptedVlms(finish="length"), scored)).text)
    assert (last["choices"], last["usage"]["completion_tokens"], last["usage"]["total_tokens"]) == ([], 3, 10)
    assert all(part["usage"] is None for part in parts)
    assert parts[-1]["choices"][0]["finish_reason"] == "length"
    first, *rows, end = [part["choices"][0]["logprobs"] for part in parts]
    assert first is None and end is None
    assert [(row["content"][0]["token"], row["content"][0]["logprob"]) for row in rows] == [
        ("<0>", 0.0), ("<1>", -0.5), ("<2>", -1.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("failure", "code", "kind"),
    [
        (Unavailable("the replica\ndied."), "unavailable", "service_unavailable"),
        (ApiError(400, "no.", code="x"), "x", "invalid_request_error"),
        (ZeroDivisionError("secret"), "internal", "server_error"),
    ],
)
async def test_a_failure_in_the_middle_is_an_error_event_and_the_end(failure: Exception, code: str, kind: str) -> None:
    vlms = ScriptedVlms(failure=failure, fails_at=2)
    at = app_state(vlms)
    async with client(at) as http:
        answer = await http.post(CHAT, json=STREAM)
    assert answer.status_code == 200
    name, data = events(answer.text)[-1]
    error = json.loads(data)["error"]
    assert (name, error["code"], error["type"]) == ("error", code, kind)
    assert "secret" not in data and "[DONE]" not in answer.text and "red " in answer.text
    assert (vlms.closed, kept(at)) == (1, ({}, 0))


async def test_an_answer_that_breaks_off_without_a_reason_is_an_error() -> None:
    assert events((await post(ScriptedVlms(finish=""), STREAM)).text)[-1][0] == "error"
    assert (await post(ScriptedVlms(words=()), STREAM)).status_code == 503


async def test_a_stream_keeps_its_release_when_another_goes_live_until_its_client_hangs_up() -> None:
    vlms = ScriptedVlms(hangs_at=2)
    at, visitor = visit(vlms, STREAM)
    await vlms.waiting.wait()
    at.admission.adopt([ReleaseSnapshot(4, None, "i", "t", "vlm-c"), *at.admission.window])
    assert kept(at) == ({3: 1}, PIXELS)
    visitor.hang_up()
    await asyncio.wait_for(visitor.task, 5)
    assert (vlms.closed, kept(at)) == (1, ({}, 0))
    start, *bodies = visitor.sent
    assert start["status"] == 200 and bodies[-1]["more_body"]
    assert all(b'"model":"vlm@3"' in each["body"] for each in bodies)


@pytest.mark.parametrize("connection", ["breaks", "is not read"])
async def test_a_connection_that_fails_aborts_the_request_before_its_release_may_be_retired(
    connection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.http.chunks.GRACE_SECONDS", 0.0)
    vlms = ScriptedVlms()
    at, visitor = visit(vlms, STREAM, deadline_seconds=3600)
    held: list[dict[int, int]] = []
    vlms.when_closed = lambda: held.append(at.admission.in_flight())
    sending = asyncio.Event()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            sending.set()
            if connection == "breaks":
                raise OSError("broken pipe")
            await asyncio.Event().wait()

    visitor.send = send  # type: ignore[method-assign]
    await sending.wait()
    skip(3600)
    await asyncio.wait_for(visitor.task, 60)
    assert (held, kept(at)) == ([{3: 1}], ({}, 0))


@settings(deadline=None, max_examples=50)
@given(st.text(), st.sampled_from(["", "error"]))
def test_an_event_carries_any_text_on_one_line(text: str, name: str) -> None:
    raw = event(dumps(text), name)
    assert raw.isascii()
    assert len(raw.decode().splitlines()) == (3 if name else 2)
    assert [(found, json.loads(data)) for found, data in events(raw.decode())] == [(name, text)]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.text(), st.integers(0, 3)), min_size=1, max_size=8), st.sampled_from(["stop", "length"]),
       st.booleans(), st.booleans())  # fmt: skip
async def test_chunks_put_together_are_the_answer(
    script: list[tuple[str, int]], finish: Finish, usage: bool, scored: bool
) -> None:
    done, chunks = 0, []
    for index, (text, count) in enumerate(script):
        done += count
        last = index == len(script) - 1
        chunks.append(TokenChunk(text, (5,) * count, (-math.inf,) * count, 4, done, finish if last else ""))

    async def rest() -> AsyncIterator[TokenChunk]:
        for chunk in chunks[1:]:
            yield chunk

    answer = ChatCompletion(SNAPSHOT, str if scored else None, include_usage=usage)
    raw = b"".join([part async for part in chunk_events(chunks[0], rest(), answer)]).decode()
    parts = objects(raw)
    choices = [part["choices"][0] for part in parts if part["choices"]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(each["delta"].get("content", "") for each in choices) == "".join(text for text, _ in script)
    assert [each["finish_reason"] for each in choices if each["finish_reason"]] == [finish]
    rows = [row for each in choices for row in (each["logprobs"] or {"content": []})["content"]]
    assert [(row["token"], row["logprob"]) for row in rows] == [("5", -9999.0)] * (done if scored else 0)
    assert [part["usage"]["completion_tokens"] for part in parts if part.get("usage")] == ([done] if usage else [])
    assert events(raw)[-1] == ("", "[DONE]")


async def test_a_free_answer_is_short_and_greedy() -> None:
    vlms = ScriptedVlms(words=(" a ", "bus "))
    answer = await post(vlms, QUESTION, VQA)
    assert answer.json() == {
        "object": "vqa", "answer": "a bus", "choices": [], "model": "vlm@3", "release": 3, "adapter": "vlm-b",
        "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
    }  # fmt: skip
    assert answer.headers["x-ratchet-release"] == "3"
    sent, _ = vlms.asked[0]
    assert sent.messages == (Message("user", (0, "what is this?")),)
    assert (sent.temperature, sent.images[0].shape) == (0, (4, 6, 3))


async def test_choices_get_probabilities_that_sum_to_one() -> None:
    vlms = ScriptedVlms(logits=(-3.0, -1.0, -2.0))
    found = (await post(vlms, {**QUESTION, "choices": ["red", " green ", "blue"], "model": "vlm@2"}, VQA)).json()
    assert vlms.choices == ["red", "green", "blue"] == [row["text"] for row in found["choices"]]
    assert (found["answer"], found["release"], found["adapter"], found["usage"]) == ("green", 2, "base", None)
    red, green, blue = (row["probability"] for row in found["choices"])
    assert red + green + blue == pytest.approx(1)
    assert green / red == pytest.approx(math.exp(2))
    broken = await post(ScriptedVlms(logits=(math.nan, 0.0)), {**QUESTION, "choices": ["a", "b"]}, VQA)
    assert (broken.status_code, broken.json()["error"]["code"]) == (500, "not_finite")


@pytest.mark.parametrize("choices", [["yes", "no"], '["yes", "no"]'], ids=["repeated", "one JSON list"])
async def test_multipart_says_the_same_and_takes_one_file_of_its_name(choices: Any) -> None:
    vlms = ScriptedVlms(logits=(-0.1, -2.0))
    data = {"question": "is it a shoe?", "choices": choices}
    async with client(app_state(vlms)) as http:
        answer = await http.post(VQA, files={"image": ("shoe.png", png(), "image/png")}, data=data)
        wrong = await http.post(VQA, files={"picture": png()}, data=data)
        two = await http.post(VQA, files=[("image", png()), ("image", png())], data=data)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["answer"], vlms.choices) == ("yes", ["yes", "no"])
    assert vlms.asked[0][0].images[0].shape == (4, 6, 3)
    assert (wrong.status_code, two.status_code) == (400, 400)
    assert wrong.json()["error"]["code"] == "unknown_field"


def test_scores_without_a_meaning_are_an_error_and_an_impossible_choice_has_no_probability() -> None:
    assert normalised([-math.inf, -1.0]) == [0.0, 1.0]
    for scores in ([-math.inf, -math.inf], [0.0, math.nan], [math.inf, 0.0]):
        with pytest.raises(ApiError):
            normalised(scores)
