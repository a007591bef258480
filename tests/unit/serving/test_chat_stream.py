"""Chat that is streamed: order and form of the chunks, failures in the middle, clients that leave or read slowly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engines.vlm.generation import Finish, TokenChunk
from serving.errors import Unavailable
from serving.http.chat import chunk_events
from serving.http.chunks import ChatCompletion, dumps, event, failure
from serving.http.errors import ApiError
from serving.releases.types import ReleaseSnapshot
from tests.unit.serving.scripted_vlms import (
    SETTINGS,
    ScriptedVlms,
    Visitor,
    about_image,
    app_of,
    app_state,
    client,
    skip,
)

URL = "/v1/chat/completions"
SNAPSHOT = ReleaseSnapshot(3, None, "i", "t", "vlm-b")


def body(**more: Any) -> dict[str, Any]:
    return {"messages": about_image(), "stream": True, **more}


def events(text: str) -> list[tuple[str, str]]:
    """(event, data) pairs, read as the standard says: lines end with \\n only here, an empty line ends an event."""
    found = []
    for block in text.split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((lines.get("event", ""), lines["data"]))
    return found


def objects(text: str) -> list[Any]:
    return [json.loads(data) for _, data in events(text) if data != "[DONE]"]


async def test_the_role_comes_first_then_the_text_then_why_it_ended() -> None:
    async with client(app_state(ScriptedVlms())) as http:
        answer = await http.post(URL, json=body())
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-ratchet-release"] == "3"
    assert answer.headers["x-ratchet-adapter"] == "vlm-b"
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


async def test_usage_comes_in_a_chunk_of_its_own_when_asked_for() -> None:
    async with client(app_state(ScriptedVlms(finish="length"))) as http:
        answer = await http.post(URL, json=body(stream_options={"include_usage": True}))
    parts = objects(answer.text)
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert all(part["usage"] is None for part in parts[:-1])
    assert parts[-2]["choices"][0]["finish_reason"] == "length"


async def test_log_probabilities_come_with_the_chunk_they_belong_to() -> None:
    async with client(app_state(ScriptedVlms())) as http:
        answer = await http.post(URL, json=body(logprobs=True))
    rows = [part["choices"][0]["logprobs"] for part in objects(answer.text)]
    assert rows[0] is None and rows[-1] is None
    assert [row["content"][0]["logprob"] for row in rows[1:-1]] == [0.0, -0.5, -1.0]
    assert [row["content"][0]["token"] for row in rows[1:-1]] == ["<0>", "<1>", "<2>"]


@pytest.mark.parametrize(
    ("failure", "code", "kind"),
    [
        (Unavailable("the replica died."), "unavailable", "service_unavailable"),
        (ApiError(400, "no.", code="x"), "x", "invalid_request_error"),
        (ZeroDivisionError("secret"), "internal", "server_error"),
    ],
)
async def test_a_failure_in_the_middle_is_an_error_event_and_the_end(failure: Exception, code: str, kind: str) -> None:
    vlms = ScriptedVlms(failure=failure, fails_at=2)
    at = app_state(vlms)
    async with client(at) as http:
        answer = await http.post(URL, json=body())
    assert answer.status_code == 200
    name, data = events(answer.text)[-1]
    assert name == "error"
    assert json.loads(data)["error"]["code"] == code
    assert json.loads(data)["error"]["type"] == kind
    assert "secret" not in data
    assert "[DONE]" not in answer.text
    assert "red " in answer.text
    assert vlms.closed == 1
    assert at.admission.in_flight() == {}


async def test_an_answer_that_breaks_off_without_a_reason_is_an_error() -> None:
    async with client(app_state(ScriptedVlms(finish=""))) as http:
        answer = await http.post(URL, json=body())
    assert events(answer.text)[-1][0] == "error"
    async with client(app_state(ScriptedVlms(words=()))) as http:
        assert (await http.post(URL, json=body())).status_code == 503


async def test_a_client_that_hangs_up_while_it_listens_aborts_the_request() -> None:
    vlms = ScriptedVlms(hangs_at=2)
    at = app_state(vlms)
    visitor = Visitor(app_of(at), URL, json.dumps(body()).encode())
    task = visitor.start()
    await vlms.waiting.wait()
    assert at.admission.in_flight() == {3: 1}
    visitor.gone.set()
    await asyncio.wait_for(task, 5)
    assert vlms.closed == 1
    assert at.admission.in_flight() == {}
    assert visitor.sent[0]["status"] == 200
    assert visitor.sent[-1]["more_body"]


async def test_a_connection_that_breaks_aborts_the_request_before_its_release_may_be_retired() -> None:
    vlms = ScriptedVlms()
    at = app_state(vlms)
    held: list[dict[int, int]] = []
    vlms.when_closed = lambda: held.append(at.admission.in_flight())
    visitor = Visitor(app_of(at), URL, json.dumps(body()).encode())

    async def broken(message: Any) -> None:
        if message["type"] == "http.response.body":
            raise OSError("broken pipe")

    visitor.send = broken  # type: ignore[method-assign]
    await asyncio.wait_for(visitor.start(), 5)
    assert held == [{3: 1}]
    assert at.admission.in_flight() == {}


async def test_a_client_that_reads_too_slowly_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.http.chunks.GRACE_SECONDS", 0.0)
    vlms = ScriptedVlms()
    at = app_state(vlms, SETTINGS.model_copy(update={"deadline_seconds": 3600}))
    visitor = Visitor(app_of(at), URL, json.dumps(body()).encode())
    reading = asyncio.Event()

    async def stuck(message: Any) -> None:
        if message["type"] == "http.response.body":
            reading.set()
            await asyncio.Event().wait()

    visitor.send = stuck  # type: ignore[method-assign]
    task = visitor.start()
    await reading.wait()
    skip(3600)
    await asyncio.wait_for(task, 60)
    assert vlms.closed == 1
    assert at.admission.in_flight() == {}


async def test_a_stream_keeps_its_release_when_another_goes_live() -> None:
    vlms = ScriptedVlms(hangs_at=1)
    at = app_state(vlms)
    visitor = Visitor(app_of(at), URL, json.dumps(body()).encode())
    task = visitor.start()
    await vlms.waiting.wait()
    at.admission.adopt([ReleaseSnapshot(4, None, "i", "t", "vlm-c"), *at.admission.window])
    assert at.admission.in_flight() == {3: 1}
    assert b'"model":"vlm@3"' in visitor.sent[1]["body"]
    visitor.gone.set()
    await task


@given(st.text(), st.sampled_from(["", "error"]))
def test_an_event_carries_any_text_on_one_line(text: str, name: str) -> None:
    raw = event(dumps(text), name)
    assert raw.isascii()
    assert len(raw.decode().splitlines()) == (3 if name else 2)
    assert [(found, json.loads(data)) for found, data in events(raw.decode())] == [(name, text)]


@given(st.lists(st.tuples(st.text(), st.integers(0, 3)), min_size=1, max_size=8), st.sampled_from(["stop", "length"]),
       st.booleans(), st.booleans())  # fmt: skip
async def test_chunks_put_together_are_the_answer(
    script: list[tuple[str, int]], finish: Finish, usage: bool, scored: bool
) -> None:
    done, chunks = 0, []
    for index, (text, count) in enumerate(script):
        done += count
        last = index == len(script) - 1
        chunks.append(TokenChunk(text, (5,) * count, (-1.5,) * count, 4, done, finish if last else ""))

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
    assert [row["token"] for each in choices for row in (each["logprobs"] or {"content": []})["content"]] == (
        ["5"] * done if scored else []
    )
    assert [part["usage"]["completion_tokens"] for part in parts if part.get("usage")] == ([done] if usage else [])
    assert events(raw)[-1] == ("", "[DONE]")


def test_minus_infinity_stays_json() -> None:
    text = ChatCompletion(SNAPSHOT, str).chunk(TokenChunk("x", (1,), (float("-inf"),), 1, 1)).decode()
    assert objects(text)[0]["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


def test_a_failure_is_one_error_event() -> None:
    name, data = events(failure(Unavailable("one\ntwo.", "fix.")).decode())[0]
    assert (name, json.loads(data)["error"]["message"]) == ("error", "one\ntwo. fix.")
