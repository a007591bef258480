"""POST /v1/chat/completions, as in the OpenAI API: a conversation with images, whole or streamed."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serving.engines.vlm.generation import GenerationRequest, Message, TokenChunk
from serving.errors import Unavailable
from serving.http.app_state import VLM, AppState, Vlms, app_state, json_body, json_schema, stamp_headers
from serving.http.cancel_on_disconnect import cancel_on_disconnect
from serving.http.chat_schemas import ChatRequest, refuse_unknown
from serving.http.chunks import ChatCompletion
from serving.http.errors import ApiError
from serving.http.sse import EventStream
from serving.releases.release_snapshot import ReleaseSnapshot

router = APIRouter(tags=["OpenAI compatible"])
SEEDS = 2**63
"""Engines take seeds from 0 on; OpenAI's are of any sign."""
ROLES: dict[str, Any] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream`, chunks as server-sent events, then `data: [DONE]`. A stream that "
        "fails after its first piece ends with an `error` event.",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}


@router.post(
    "/v1/chat/completions", summary="Ask about images", openapi_extra=json_schema(ChatRequest), responses=EVENTS
)
async def chat_completions(request: Request) -> Response:
    """The next message of a conversation. Images are `image_url` parts of user messages: data URIs, or URLs where
    the server fetches them.

    Answers are greedy unless `temperature` says otherwise. One release answers all of it, also when streaming.
    """
    at = app_state(request)
    vlms = at.need_vlms()
    asked = await json_body(request, ChatRequest)
    refuse_unknown(asked)
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(400, "stream_options: only taken with stream.", param="stream_options", code="invalid_value")
    max_tokens = most_tokens(asked, at.settings.vlm_max_tokens)
    messages, images = conversation(asked, at)
    deadline = at.deadline()
    text_of = at.token_text if asked.logprobs else None
    async with contextlib.AsyncExitStack() as held:
        stamp = held.enter_context(at.admit(request, asked.model, VLM, asked.caller))
        headers = stamp_headers(stamp, VLM)
        async with cancel_on_disconnect(request.receive, deadline):
            pictures = await at.image_loader.pictures(images) if images else ()
            ask = GenerationRequest(
                messages, pictures, max_tokens, asked.temperature or 0.0,
                1.0 if asked.top_p is None else asked.top_p,
                None if asked.seed is None else asked.seed % SEEDS, asked.stops,
            )  # fmt: skip
            if not asked.stream:
                answer = ChatCompletion(stamp, text_of).whole(await vlms.reply(ask, stamp, deadline))
                return JSONResponse(answer, headers=headers)
            pieces = opened(vlms, ask, stamp, deadline, held)
            first = await anext(pieces, None)
        if first is None:
            raise Unavailable("the model gave no answer.", "Try again.")
        events = chunks(first, pieces, ChatCompletion(stamp, text_of, asked.include_usage))
        held.push_async_callback(events.aclose)
        return EventStream(events, held.pop_all(), headers, deadline, lambda error: at.failed(stamp, error))


def opened(
    vlms: Vlms, ask: GenerationRequest, stamp: ReleaseSnapshot, deadline: float, held: contextlib.AsyncExitStack
) -> AsyncIterator[TokenChunk]:
    """The pieces of an answer; closing ``held`` closes them, which aborts the request in the engine."""
    pieces = vlms.stream(ask, stamp, deadline)
    if isinstance(pieces, AsyncGenerator):
        held.push_async_callback(pieces.aclose)
    return pieces


async def chunks(
    first: TokenChunk, pieces: AsyncIterator[TokenChunk], answer: ChatCompletion
) -> AsyncGenerator[bytes, None]:
    """Pieces as events."""
    piece: TokenChunk | None = first
    head = answer.first()
    while piece is not None:
        text = head + answer.piece(piece)
        head = ""
        if piece.finish:
            yield text.encode() + answer.last(piece.finish, piece.prompt_tokens, piece.completion_tokens)
            with contextlib.suppress(Exception):  # let it end by itself: closing it would abort what is done
                await anext(pieces, None)
            return
        if text:
            yield text.encode()
        piece = await anext(pieces, None)
    raise Unavailable("the answer broke off.", "Send the request again.")


def most_tokens(asked: ChatRequest, limit: int) -> int:
    """How long the answer may be. Raises ApiError when more is asked for than the server gives."""
    newer, older = asked.max_completion_tokens, asked.max_tokens
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


def conversation(asked: ChatRequest, at: AppState) -> tuple[tuple[Message, ...], list[tuple[str, str | bytes]]]:
    """Messages, and the images they point to with their places in the request. Raises ApiError."""
    messages: list[Message] = []
    images: list[tuple[str, str | bytes]] = []
    texts = 0
    for index, message in enumerate(asked.messages):
        content: list[str | int] = []
        for number, part in enumerate(message.content):
            place = f"messages.{index}.content.{number}"
            if part.image_url is not None:
                if message.role != "user":
                    raise ApiError(400, f"{place}: images go into user messages.", param=place, code="image_place")
                content.append(len(images))
                images.append((f"{place}.image_url", part.image_url.url))
            elif part.text:
                at.check_length(place, part.text)
                content.append(part.text)
                texts += 1
        messages.append(Message(ROLES[message.role], tuple(content)))
    if not texts and not images:
        raise ApiError(400, "messages: there is neither a text nor an image.", param="messages", code="empty_text")
    if texts > at.settings.max_texts:
        raise ApiError(
            400, f"messages: {texts} texts are more than {at.settings.max_texts}.", param="messages",
            code="too_many_texts",
        )  # fmt: skip
    return tuple(messages), images
