"""Chat that is not streamed: what reaches the model, what comes back, and what is refused."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from core.settings.serving import Serve
from serving.engines.vlm.generation import Message
from serving.errors import DeadlineExceeded, EngineDead, InvalidRequest, QueueFull, Unavailable
from tests.unit.serving.scripted_vlms import (
    SETTINGS,
    ScriptedVlms,
    Visitor,
    about_image,
    app_of,
    app_state,
    client,
    png,
    skip,
    uri,
)

URL = "/v1/chat/completions"


async def post(vlms: ScriptedVlms | None, body: Any, settings: Serve = SETTINGS) -> Any:
    async with client(app_state(vlms, settings)) as http:
        return await http.post(URL, json=body)


async def test_an_answer_is_openais_object_and_names_its_release() -> None:
    vlms = ScriptedVlms()
    answer = await post(vlms, {"model": "vlm", "messages": about_image()})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "vlm@3"
    assert body["system_fingerprint"] == answer.headers["x-ratchet-adapter"] == "vlm-b"
    assert answer.headers["x-ratchet-release"] == "3"
    assert body["choices"] == [
        {
            "index": 0, "message": {"role": "assistant", "content": "a red bus", "refusal": None}, "logprobs": None,
            "finish_reason": "stop",
        }
    ]  # fmt: skip
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


async def test_the_model_gets_texts_images_and_how_to_answer() -> None:
    vlms = ScriptedVlms()
    messages = [
        {"role": "developer", "content": "be short", "name": "ann"},
        *about_image("one", uri(png(6, 4))),
        {"role": "assistant", "content": "1", "refusal": None, "tool_calls": None, "annotations": []},
        *about_image("two", uri(png(3, 5))),
    ]
    answer = await post(
        vlms,
        {"messages": messages, "max_completion_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": -4, "stop": "."},
    )
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


async def test_an_answer_is_greedy_and_as_long_as_allowed_unless_told_otherwise() -> None:
    vlms = ScriptedVlms()
    await post(vlms, {"messages": about_image()})
    ask, _ = vlms.asked[0]
    assert (ask.max_tokens, ask.temperature, ask.top_p, ask.seed, ask.stop) == (32, 0.0, 1.0, None, ())


@pytest.mark.parametrize(("model", "adapter", "release"), [("vlm@2", "base", "2"), ("vlm-b", "vlm-b", "3")])
async def test_older_releases_and_adapters_are_addressed_by_name(model: str, adapter: str, release: str) -> None:
    answer = await post(ScriptedVlms(), {"model": model, "messages": about_image()})
    assert answer.headers["x-ratchet-adapter"] == adapter
    assert answer.headers["x-ratchet-release"] == release


async def test_log_probabilities_come_with_their_tokens() -> None:
    body = {"messages": about_image(), "logprobs": True, "top_logprobs": 0}
    rows = (await post(ScriptedVlms(), body)).json()["choices"][0]["logprobs"]["content"]
    assert [row["logprob"] for row in rows] == [0.0, -0.5, -1.0]
    assert rows[1] == {"token": "<1>", "logprob": -0.5, "bytes": list(b"<1>"), "top_logprobs": []}


async def test_an_image_larger_than_a_model_looks_at_is_scaled_down() -> None:
    vlms = ScriptedVlms()
    wide = uri(png(4096, 64))
    answer = await post(vlms, {"messages": about_image(image=wide)})
    assert answer.status_code == 200, answer.text
    assert vlms.asked[0][0].images[0].shape == (32, 2048, 3)


async def test_many_images_share_the_pixels_of_a_request() -> None:
    vlms = ScriptedVlms()
    four = [message for _ in range(4) for message in about_image(image=uri(png(700, 700)))]
    assert (await post(vlms, {"messages": four})).status_code == 200
    assert sum(image.shape[0] * image.shape[1] for image in vlms.asked[0][0].images) <= SETTINGS.max_pixels


HARMLESS = {
    "user": "ann", "metadata": {"a": "b"}, "n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "store": False,
    "response_format": {"type": "text"}, "tools": None, "tool_choice": "none", "logit_bias": {}, "logprobs": False,
    "top_k": -1, "ignore_eos": False, "stream": False, "stream_options": None, "stop": None, "seed": None,
    "temperature": None, "top_p": None, "max_tokens": None, "parallel_tool_calls": True, "service_tier": "auto",
}  # fmt: skip


async def test_fields_that_change_nothing_are_taken() -> None:
    answer = await post(ScriptedVlms(), {"messages": about_image(), **HARMLESS})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"), ({"functions": [{}]}, "functions"),
        ({"tool_choice": "required"}, "tool_choice"), ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"n": 2}, "n"), ({"presence_penalty": 0.5}, "presence_penalty"), ({"top_logprobs": 3}, "top_logprobs"),
        ({"logit_bias": {"1": 5}}, "logit_bias"), ({"audio": {}}, "audio"), ({"wat": 1}, "wat"),
        ({"max_tokens": 33}, "max_tokens"), ({"max_completion_tokens": 33}, "max_completion_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"), ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 2.1}, "temperature"), ({"temperature": -0.1}, "temperature"), ({"top_p": 0}, "top_p"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"), ({"stop": ""}, "stop"), ({"stop": [""]}, "stop"),
        ({"seed": 2**63}, "seed"), ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"), ({"messages": [{"role": "user", "content": ""}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "user", "content": "x" * 101}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0"),
        ({"messages": [{**about_image()[0], "role": "system"}]}, "messages.0.content.0"),
        ({"messages": about_image(image="https://example.org/a.png")}, "messages.0.content.0.image_url"),
        ({"messages": about_image(image="data:image/png;base64,AAAA")}, "messages.0.content.0.image_url"),
        ({"messages": about_image() * 5}, "messages"),
    ],
)  # fmt: skip
async def test_what_cannot_be_honoured_is_refused_by_name(extra: dict[str, Any], param: str) -> None:
    vlms = ScriptedVlms()
    answer = await post(vlms, {"messages": about_image(), **extra})
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert (error["param"] or "").startswith(param), error
    assert error["type"] == "invalid_request_error"
    assert param.split(".")[0] in error["message"]
    assert vlms.asked == []


async def test_the_limit_of_tokens_is_named() -> None:
    answer = await post(ScriptedVlms(), {"messages": about_image(), "max_tokens": 1000})
    assert "32 (serve.vlm_max_tokens)" in answer.json()["error"]["message"]


async def test_an_unknown_model_is_told_which_vlms_are_resident() -> None:
    answer = await post(ScriptedVlms(), {"model": "clip", "messages": about_image()})
    assert answer.status_code == 404
    assert "vlm, vlm@3, vlm@2, vlm-b, base" in answer.json()["error"]["message"]


async def test_without_a_vlm_the_fix_is_told() -> None:
    answer = await post(None, {"messages": about_image()})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "no_vlm"
    assert "base.vlm" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (QueueFull("full."), 429, "overloaded"), (DeadlineExceeded("late."), 504, "deadline_exceeded"),
        (Unavailable("down."), 503, "unavailable"), (EngineDead("dead."), 503, "unavailable"),
        (InvalidRequest("too long."), 400, "invalid_request"),
    ],
)  # fmt: skip
async def test_a_failure_before_the_first_chunk_is_a_status(
    failure: Exception, status: int, code: str, stream: bool
) -> None:
    at = app_state(ScriptedVlms(failure=failure))
    async with client(at) as http:
        answer = await http.post(URL, json={"messages": about_image(), "stream": stream})
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    assert at.admission.in_flight() == {}


@pytest.mark.parametrize("stream", [False, True])
async def test_the_deadline_holds_for_the_first_chunk_too(stream: bool) -> None:
    vlms = ScriptedVlms(hangs_at=0)
    body = {"messages": about_image(), "stream": stream}
    asking = asyncio.create_task(post(vlms, body, SETTINGS.model_copy(update={"deadline_seconds": 3600})))
    await vlms.waiting.wait()
    skip(3600)
    answer = await asking
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert vlms.closed == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_before_the_first_chunk_aborts_the_request(stream: bool) -> None:
    vlms = ScriptedVlms(hangs_at=0)
    at = app_state(vlms)
    visitor = Visitor(app_of(at), URL, json.dumps({"messages": about_image(), "stream": stream}).encode())
    task = visitor.start()
    await vlms.waiting.wait()
    assert at.admission.in_flight() == {3: 1}
    visitor.gone.set()
    await asyncio.wait_for(task, 5)
    assert vlms.closed == 1
    assert at.admission.in_flight() == {}
    assert visitor.sent[0]["status"] == 499


@pytest.mark.parametrize("gone", [False, True])
async def test_a_server_that_cancels_a_request_aborts_it_and_is_obeyed(gone: bool) -> None:
    vlms = ScriptedVlms(hangs_at=0)
    at = app_state(vlms)
    visitor = Visitor(app_of(at), URL, json.dumps({"messages": about_image()}).encode())
    task = visitor.start()
    await vlms.waiting.wait()
    if gone:  # Ray tells of a client that left, and cancels at the same time
        visitor.gone.set()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert vlms.closed == 1
    assert at.admission.in_flight() == {}


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
        alone = [row["family"] for row in (await http.get("/v1/models")).json()["data"]]
    assert set(alone) == {"clip"}
