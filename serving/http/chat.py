"""POST /v1/chat/completions, as in the OpenAI API: a conversation with images, whole or streamed."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serving.engines.vlm.generation import MAX_IMAGES, SEEDS, GenerationRequest, Message, TokenChunk
from serving.errors import Unavailable
from serving.http.app_state import VLM, AppState, app_state, release_headers
from serving.http.cancel_on_disconnect import cancel_on_disconnect
from serving.http.chat_schemas import ChatRequest, refuse_unknown
from serving.http.chunks import ChatCompletion, EventStream
from serving.http.errors import ApiError
from serving.http.json_bodies import inline, json_body, json_schema
from serving.http.request_bodies import caller_of
from serving.http.response_schemas import ChatCompletionBody, ChatCompletionChunk
from serving.http.vlm_calls import MirroredVlms
from serving.releases.types import ReleaseSnapshot

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
        raise ApiError(400, "stream_options: only taken with stream.", param="stream_options", code="invalid_value")
    max_tokens = most_tokens(body, state.settings.vlm_max_tokens)
    messages, images = conversation(body, state)
    deadline = state.deadline()
    text_of = state.token_text if body.logprobs else None
    async with contextlib.AsyncExitStack() as held:
        snapshot = held.enter_context(state.admit(request, body.model, VLM, body.caller))
        headers = release_headers(snapshot, VLM)
        async with cancel_on_disconnect(request.receive, deadline):
            pictures = await held.enter_async_context(state.image_loader.pictures(images, caller_of(request)))
            generation = GenerationRequest(
                messages, pictures, max_tokens, body.temperature or 0.0,
                1.0 if body.top_p is None else body.top_p,
                None if body.seed is None else body.seed % SEEDS, body.stops,  # of any sign
            )  # fmt: skip
            if not body.stream:
                answer = ChatCompletion(snapshot, text_of).whole(await vlms.reply(generation, snapshot, deadline))
                return JSONResponse(answer, headers=headers)
            chunks = opened(vlms, generation, snapshot, deadline, held)
            first = await anext(chunks, None)
        if first is None:
            raise Unavailable("the model gave no answer.", "Try again.")
        events = chunk_events(first, chunks, ChatCompletion(snapshot, text_of, body.include_usage))
        held.push_async_callback(events.aclose)
        return EventStream(events, held.pop_all(), headers, deadline, lambda error: state.failed(snapshot, error))


def opened(
    vlms: MirroredVlms,
    generation: GenerationRequest,
    snapshot: ReleaseSnapshot,
    deadline: float,
    held: contextlib.AsyncExitStack,
) -> AsyncIterator[TokenChunk]:
    """The chunks of an answer; closing ``held`` closes them, which aborts the request in the engine."""
    chunks = vlms.stream(generation, snapshot, deadline)
    if isinstance(chunks, AsyncGenerator):
        held.push_async_callback(chunks.aclose)
    return chunks


async def chunk_events(
    first: TokenChunk, chunks: AsyncIterator[TokenChunk], answer: ChatCompletion
) -> AsyncGenerator[bytes, None]:
    """Chunks as events."""
    chunk: TokenChunk | None = first
    head = answer.first()
    while chunk is not None:
        text = head + answer.chunk(chunk)
        head = ""
        if chunk.finish:
            yield text.encode() + answer.last(chunk.finish, chunk.prompt_tokens, chunk.completion_tokens)
            with contextlib.suppress(Exception):  # let it end by itself: closing it would abort what is done
                await anext(chunks, None)
            return
        if text:
            yield text.encode()
        chunk = await anext(chunks, None)
    raise Unavailable("the answer broke off.", "Send the request again.")


def most_tokens(body: ChatRequest, limit: int) -> int:
    """How long the answer may be. Raises ApiError when more is asked for than the server gives."""
    newer, older = body.max_completion_tokens, body.max_tokens
    if newer is not None and older is not None and newer != older:
        raise ApiError(
            400, "max_tokens: give either max_tokens or max_completion_tokens.", param="max_tokens",
            code="invalid_value",
        )  # fmt: skip
    wanted, param = (older, "max_tokens") if newer is None else (newer, "max_completion_tokens")
    if wanted is not None and wanted > limit:
        raise ApiError(
            400, f"{param}: {wanted} tokens are more than {limit} (serve.vlm_max_tokens).", param=param,
            code="too_many_tokens",
        )  # fmt: skip
    return limit if wanted is None else wanted


def conversation(body: ChatRequest, state: AppState) -> tuple[tuple[Message, ...], list[tuple[str, str | bytes]]]:
    """Messages, and the images they point to with their places in the request. Raises ApiError."""
    messages: list[Message] = []
    images: list[tuple[str, str | bytes]] = []
    texts = 0
    for index, message in enumerate(body.messages):
        content: list[str | int] = []
        for number, part in enumerate(message.content):
            place = f"messages.{index}.content.{number}"
            if part.image_url is not None:
                if message.role != "user":
                    raise ApiError(400, f"{place}: images go into user messages.", param=place, code="image_place")
                content.append(len(images))
                images.append((f"{place}.image_url", part.image_url.url))
            elif part.text:
                state.check_length(place, part.text)
                content.append(part.text)
                texts += 1
        messages.append(Message(ROLES[message.role], tuple(content)))
    if not texts and not images:
        raise ApiError(400, "messages: there is neither a text nor an image.", param="messages", code="empty_text")
    if texts > state.settings.max_texts:
        raise ApiError(
            400, f"messages: {texts} texts are more than {state.settings.max_texts}.", param="messages",
            code="too_many_texts",
        )  # fmt: skip
    if len(images) > MAX_IMAGES:
        raise ApiError(
            400, f"messages: {len(images)} images are more than {MAX_IMAGES}.", param="messages",
            code="too_many_images",
        )  # fmt: skip
    return tuple(messages), images
