"""OpenAI's own client reads chat answers, whole, streamed and failed."""

from __future__ import annotations

import openai
import pytest

from serving.errors import QueueFull, Unavailable
from serving.http.app_state import AppState
from tests.unit.serving.scripted_vlms import ScriptedVlms, about_image, app_state, client

MESSAGES = about_image("what is this?")


def reader(at: AppState) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="none", max_retries=0, http_client=client(at))


async def test_it_reads_a_whole_answer() -> None:
    async with reader(app_state(ScriptedVlms())) as api:
        answer = await api.chat.completions.create(model="vlm", messages=MESSAGES, logprobs=True, max_tokens=8)
        raw = await api.chat.completions.with_raw_response.create(model="vlm@2", messages=MESSAGES, temperature=0)
    assert answer.choices[0].message.content == "a red bus"
    assert answer.choices[0].finish_reason == "stop"
    assert [row.logprob for row in answer.choices[0].logprobs.content] == [0.0, -0.5, -1.0]
    assert answer.usage.total_tokens == 10
    assert raw.headers["x-ratchet-release"] == "2"


async def test_it_reads_a_stream() -> None:
    async with reader(app_state(ScriptedVlms())) as api:
        stream = await api.chat.completions.create(
            model="vlm", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, logprobs=True
        )
        parts = [part async for part in stream]
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == "a red bus"
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-2].choices[0].finish_reason == "stop"
    assert parts[-1].usage.total_tokens == 10
    assert stream.response.headers["x-ratchet-adapter"] == "vlm-b"


async def test_its_stream_helper_puts_the_answer_together() -> None:
    async with (
        reader(app_state(ScriptedVlms())) as api,
        api.chat.completions.stream(model="vlm", messages=MESSAGES) as s,
    ):
        final = await s.get_final_completion()
    assert final.choices[0].message.content == "a red bus"


async def test_it_raises_its_own_errors() -> None:
    async with reader(app_state(ScriptedVlms(failure=QueueFull("full.")))) as api:
        with pytest.raises(openai.RateLimitError, match="full"):
            await api.chat.completions.create(model="vlm", messages=MESSAGES)
    async with reader(app_state(ScriptedVlms())) as api:
        with pytest.raises(openai.NotFoundError, match="not resident"):
            await api.chat.completions.create(model="gpt", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError, match="response_format"):
            await api.chat.completions.create(model="vlm", messages=MESSAGES, response_format={"type": "json_object"})


async def test_it_raises_when_a_stream_fails_in_the_middle() -> None:
    async with reader(app_state(ScriptedVlms(failure=Unavailable("the replica died."), fails_at=1))) as api:
        stream = await api.chat.completions.create(model="vlm", messages=MESSAGES, stream=True)
        heard = []
        with pytest.raises(openai.APIError, match="replica died"):
            async for part in stream:
                heard.append(part.choices[0].delta.content)  # noqa: PERF401  what came before the failure counts
    assert heard == ["", "a "]


async def test_it_lists_the_models() -> None:
    async with reader(app_state(ScriptedVlms())) as api:
        names = [model.id async for model in api.models.list()]
    assert {"clip", "vlm", "vlm@2", "vlm-b"} <= set(names)
