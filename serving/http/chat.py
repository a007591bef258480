"""POST /v1/chat/completions, as in the OpenAI API: a conversation with images, whole or streamed. Unknown fields, which
OpenAI's clients send, are accepted where they change nothing, else refused (:func:`refuse_unknown`)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BeforeValidator, ConfigDict, FailFast, Field, model_validator

from serving.engines.vlm.generation import (
    MAX_IMAGES,
    SEEDS,
    SMALLEST,
    GenerationRequest,
    Message,
    TokenChunk,
    is_denormal,
)
from serving.errors import Unavailable
from serving.http.app_state import VLM, AppState, app_state
from serving.http.bodies import VLM_MODEL, Body, ImageUrl, OpenAIBody, inline, is_empty, json_body, json_schema
from serving.http.chunks import ChatCompletion, ChatCompletionBody, ChatCompletionChunk, EventStream
from serving.http.errors import ApiError, field_error
from serving.http.image_loader import gathered
from serving.http.request_bodies import caller_of, cancel_on_disconnect
from serving.messages import TEXTS_PER_REQUEST

router = APIRouter(tags=["OpenAI compatible"])
ROLES: dict[str, Any] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
EVENT: dict[str, Any] = {
    "type": "string",
    "description": "Lines `data: {...}`, each with one chunk, and an empty line after each.",
    "contentMediaType": "application/json",
    "contentSchema": inline(ChatCompletionChunk),
}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream`, chunks as server-sent events, then `data: [DONE]`. A stream that "
        "fails after its first piece ends with an `error` event.",
        "content": {"text/event-stream": {"schema": EVENT}},
    }
}
MAX_MESSAGES = 256
Stop = Annotated[str, Field(min_length=1, max_length=100)]


def _not_denormal(value: float) -> float:
    if is_denormal(value):
        raise ValueError(f"Input is too small: it should be 0, or at least {SMALLEST:.3g}")
    return value


Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False), AfterValidator(_not_denormal)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), AfterValidator(_not_denormal)]

HARMLESS = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "parallel_tool_calls",
}  # fmt: skip
"""Fields that never change an answer of this server."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,),
    "logit_bias": ({},), "top_logprobs": (0,), "modalities": (["text"],),
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "top_k": (-1, 0), "min_p": (0,), "min_tokens": (0,), "ignore_eos": (False,), "use_beam_search": (False,),
    "skip_special_tokens": (True,), "echo": (False,), "reasoning_effort": ("none",), "verbosity": ("medium",),
}  # fmt: skip
"""Fields of OpenAI and vLLM, accepted with these values, which turn them off."""
TOOLS = {"tools", "functions", "tool_choice", "function_call"}
MAX_ANSWERS = 8
MAX_SCHEMA_CHARS = 16_384
"""vLLM compiles a schema to a grammar, which takes time and memory."""


class ContentPart(OpenAIBody, Body):
    """{"type": "text", "text": "..."} or {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}"""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def has_what_it_says(self) -> ContentPart:
        other = "image_url" if self.type == "text" else "text"
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of type {self.type!r} needs the field {self.type!r}")
        if getattr(self, other) is not None:
            raise ValueError(f"a part of type {self.type!r} takes no field {other!r}")
        return self


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class ChatMessage(OpenAIBody):
    """One turn. Images go into user messages."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[ContentPart], FailFast(), BeforeValidator(_parts, json_schema_input_type=str | list[ContentPart])
    ]


class StreamOptions(OpenAIBody):
    """Options of a stream."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = Field(False, description="Send one more chunk before [DONE], with the token counts.")


class ResponseFormat(OpenAIBody, Body):
    """{"type": "json_schema", "json_schema": {"schema": {"type": "object", ...}}}, {"type": "json_object"} or {"type":
    "text"}"""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None

    @property
    def schema_text(self) -> str:
        """The JSON Schema of the answer as JSON; empty for any text. Raises ApiError."""
        if self.type == "text":
            return ""
        schema = {"type": "object"} if self.type == "json_object" else (self.json_schema or {}).get("schema")
        if not isinstance(schema, dict) or len(text := json.dumps(schema)) > MAX_SCHEMA_CHARS:
            problem = f"give a JSON Schema of at most {MAX_SCHEMA_CHARS} characters."
            raise field_error("response_format.json_schema.schema", problem, "invalid_value")
        return text


class ChatRequest(OpenAIBody):
    """A conversation to continue. Images are data URIs or URLs."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "additionalProperties": False,
            "examples": [
                {
                    "model": "vlm", "max_tokens": 16,
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo..."}},
                                {"type": "text", "text": "what colour is the bus?"},
                            ],
                        }
                    ],
                },
                {"model": "vlm", "messages": [{"role": "user", "content": "hello"}], "stream": True},
            ],
        },
    )  # fmt: skip
    messages: Annotated[list[ChatMessage], FailFast()] = Field(
        min_length=1, max_length=MAX_MESSAGES, description="The conversation so far, the oldest message first."
    )
    model: str = VLM_MODEL
    max_tokens: int | None = Field(
        None, ge=1, description="Maximum tokens of the answer; cut to the server's maximum, which is the default."
    )
    max_completion_tokens: int | None = Field(None, ge=1, description="OpenAI's newer name of max_tokens.")
    temperature: Temperature | None = Field(
        None, description="0 (default): always the most likely token. Values between 0 and 0.01 count as 0.01."
    )
    top_p: TopP | None = Field(None, description="Sample from the most likely tokens with this total probability.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Makes sampling repeatable.")
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=4)] | None = Field(
        None, description="Up to four texts that end the answer, and are not included in it."
    )
    stream: bool | None = Field(None, description="Stream the answer as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Options for `stream`.")
    n: int = Field(
        1, ge=1, le=MAX_ANSWERS, description="Number of answers; more than 1 with a temperature above 0, not streamed."
    )
    response_format: ResponseFormat | None = Field(
        None, description="Makes the answer follow a JSON schema. Only where vLLM is the engine, else 400."
    )
    logprobs: bool | None = Field(None, description="Return each token's natural log-probability.")

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def caller(self) -> str | None:
        """OpenAI's ``user``, or its newer name ``safety_identifier``: the caller."""
        extra = self.model_extra or {}
        name = extra.get("user") or extra.get("safety_identifier")
        return name if isinstance(name, str) else None


def refuse_unknown(body: ChatRequest) -> None:
    """Refuse fields that would change the answer (ApiError naming the field), and drop the others, which as Python
    objects may take many times their size."""
    extra = body.model_extra or {}
    for name, value in extra.items():
        if name in HARMLESS or value in NEUTRAL.get(name, ()):
            continue
        if name in TOOLS:
            raise field_error(name, "the models here call no tools. Leave it out.", "unsupported_parameter")
        if name in NEUTRAL:
            allowed = " or ".join(repr(each) for each in NEUTRAL[name])
            raise field_error(name, f"this server takes only {allowed} here. Leave it out.", "unsupported_parameter")
        shown = name[:80]
        if name in {"audio", "prediction", "web_search_options", "moderation"}:
            raise ApiError(400, f"{shown} is not supported here.", param=shown, code="unsupported_parameter")
        raise ApiError(400, f"unknown parameter: {shown!r}.", param=shown, code="unknown_parameter")
    caller = body.caller
    extra.clear()
    if caller is not None:
        extra["user"] = caller
    for index, message in enumerate(body.messages):
        for name, value in (message.model_extra or {}).items():
            if not (is_empty(value) or name == "name"):
                place = f"messages.{index}.{name[:80]}"
                raise ApiError(400, f"{place} is not supported here.", param=place, code="unsupported_parameter")
        if message.model_extra:
            message.model_extra.clear()


@router.post(
    "/v1/chat/completions",
    summary="Ask about images",
    response_model=ChatCompletionBody,
    responses=EVENTS,
    openapi_extra=json_schema(ChatRequest),
)
async def chat_completions(request: Request) -> Response:
    """The next message of a conversation. Images are `image_url` parts of user messages: data URIs, or URLs where
    the server fetches them.

    Answers are greedy unless `temperature` says otherwise. One release answers all of it, also when streaming.
    """
    state = app_state(request)
    vlms = state.need_vlms()
    body = await json_body(request, ChatRequest)
    refuse_unknown(body)
    if body.stream_options is not None and not body.stream:
        raise field_error("stream_options", "only taken with stream.", "invalid_value")
    if body.n > 1 and (body.stream or not body.temperature):
        raise field_error("n", "more than one answer needs a temperature above 0, and no stream.", "invalid_value")
    schema = body.response_format.schema_text if body.response_format is not None else ""
    max_tokens = most_tokens(body, state.settings.vlm_max_tokens)
    messages, images = conversation(body, state)
    deadline = state.deadline()
    text_of = state.token_text if body.logprobs else None
    async with contextlib.AsyncExitStack() as held:
        snapshot = held.enter_context(state.admit(request, body.model, VLM, body.caller))
        headers = state.headers(request, "chat", snapshot, VLM)
        async with cancel_on_disconnect(request.receive, deadline):
            pictures = await held.enter_async_context(state.image_loader.pictures(images, caller_of(request.scope)))
            generation = GenerationRequest(
                messages, pictures, max_tokens, body.temperature or 0.0,
                1.0 if body.top_p is None else body.top_p,
                None if body.seed is None else body.seed % SEEDS, body.stops, schema,  # the seed may be negative
            )  # fmt: skip
            if not body.stream:
                replies = await gathered(vlms.reply(each, snapshot, deadline) for each in drawn(generation, body.n))
                state.offer(generation)
                return JSONResponse(ChatCompletion(snapshot, text_of).whole(replies), headers=headers)
            state.offer(generation)
            chunks = vlms.stream(generation, snapshot, deadline)
            if isinstance(chunks, AsyncGenerator):  # closing it aborts the request in the engine
                held.push_async_callback(chunks.aclose)
            first = await anext(chunks, None)
        if first is None:
            raise Unavailable("the model gave no answer.", "Try again.")
        counted = body.stream_options is not None and body.stream_options.include_usage
        events = chunk_events(first, chunks, ChatCompletion(snapshot, text_of, counted))
        held.push_async_callback(events.aclose)
        return EventStream(events, held.pop_all(), headers, deadline, lambda error: state.failed(snapshot, error))


async def chunk_events(
    first: TokenChunk, chunks: AsyncIterator[TokenChunk], answer: ChatCompletion
) -> AsyncGenerator[bytes, None]:
    chunk: TokenChunk | None = first
    head = answer.first()
    while chunk is not None:
        data = head + answer.chunk(chunk)
        head = b""
        if chunk.finish:
            yield data + answer.last(chunk.finish, chunk.prompt_tokens, chunk.completion_tokens)
            with contextlib.suppress(Exception):  # let it end by itself: closing would abort a finished request
                await anext(chunks, None)
            return
        if data:
            yield data
        chunk = await anext(chunks, None)
    raise Unavailable("the answer broke off.", "Send the request again.")


def drawn(generation: GenerationRequest, n: int) -> list[GenerationRequest]:
    """``n`` requests for answers to the same question, each with a seed of its own if there is one."""
    seed = generation.seed
    return [generation if seed is None else replace(generation, seed=(seed + i) % SEEDS) for i in range(n)]


def most_tokens(body: ChatRequest, limit: int) -> int:
    """The longest answer in tokens: as requested, at most ``limit``. Raises ApiError when two lengths differ."""
    newer, older = body.max_completion_tokens, body.max_tokens
    if newer is not None and older is not None and newer != older:
        raise field_error("max_tokens", "give either max_tokens or max_completion_tokens.", "invalid_value")
    return min(limit, newer or older or limit)


def conversation(body: ChatRequest, state: AppState) -> tuple[tuple[Message, ...], list[tuple[str, str | bytes]]]:
    """Messages, and the images in them with their places in the request. Raises ApiError."""
    messages: list[Message] = []
    images: list[tuple[str, str | bytes]] = []
    texts = 0
    for index, message in enumerate(body.messages):
        content: list[str | int] = []
        for number, part in enumerate(message.content):
            place = f"messages.{index}.content.{number}"
            if part.image_url is not None:
                if message.role != "user":
                    raise field_error(place, "images go into user messages.", "image_place")
                content.append(len(images))
                images.append((f"{place}.image_url", part.image_url.url))
            elif part.text:
                state.check_length(place, part.text)
                content.append(part.text)
                texts += 1
        messages.append(Message(ROLES[message.role], tuple(content)))
    if not texts and not images:
        raise field_error("messages", "there is neither a text nor an image.", "empty_text")
    if texts > TEXTS_PER_REQUEST:
        raise field_error("messages", f"{texts} texts are more than {TEXTS_PER_REQUEST}.", "too_many_texts")
    if len(images) > MAX_IMAGES:
        raise field_error("messages", f"{len(images)} images are more than {MAX_IMAGES}.", "too_many_images")
    return tuple(messages), images
