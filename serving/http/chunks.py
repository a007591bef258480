"""OpenAI's objects for a chat answer, whole and in chunks, and the event stream that sends them. An event is a line
``data: {...}`` (after ``event: error`` for errors) and an empty line; JSON is in ASCII, because some clients also split
lines at U+2028 and U+0085."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.engines.vlm.generation import Finish, GenerationResult, TokenChunk
from serving.errors import DeadlineExceeded
from serving.http import errors
from serving.http.bodies import ChatUsage, ResponseBody
from serving.http.request_bodies import ClientGone, cancel_on_disconnect
from serving.releases.types import ReleaseSnapshot

DONE = b"data: [DONE]\n\n"
GRACE_SECONDS = 2.0
"""Engines end an answer at its deadline and say so; a client that reads too slowly is cut off this much later."""
LOWEST = -9999.0
"""Stands for minus infinity, which JSON lacks; OpenAI uses the same number."""


class TokenLogprob(ResponseBody):
    """One token of the answer."""

    token: str
    logprob: float
    """Natural logarithm of its probability; -9999 stands for minus infinity."""
    bytes: list[int] | None
    """UTF-8; null for a token that is a part of a character."""
    top_logprobs: list[Any]
    """Always empty."""


class Logprobs(ResponseBody):
    """Log-probabilities of the answer's tokens."""

    content: list[TokenLogprob]
    refusal: None


class AssistantMessage(ResponseBody):
    """The model's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class CompletionChoice(ResponseBody):
    """One of the answers: the only one, unless the request has an `n`."""

    index: int
    message: AssistantMessage
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]
    """`stop`: it ended by itself or at a stop text; `length`: at the longest answer that was asked for."""


class ChatCompletionBody(ResponseBody):
    """An answer that is not streamed, as in the OpenAI API."""

    id: str
    object: Literal["chat.completion"]
    created: int
    """Seconds since 1970, UTC."""
    model: str
    """`vlm@` and the number of the release."""
    system_fingerprint: str
    """The adapter's name; `base`: the base alone."""
    choices: list[CompletionChoice]
    usage: ChatUsage


class Delta(ResponseBody):
    """Content of a chunk: the first the role, the last nothing, the others text."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(ResponseBody):
    """A piece of the one answer."""

    index: int
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None
    """Null in all chunks but the last."""


class ChatCompletionChunk(ResponseBody):
    """The data of one server-sent event of a streamed answer, as in the OpenAI API."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    """Seconds since 1970, UTC."""
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    """Empty in the chunk with the usage."""
    usage: ChatUsage | None = None
    """Only with `stream_options.include_usage`: null in all chunks but the last."""


def dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def event(data: str, name: str = "") -> bytes:
    """One event. ``data`` must be one line."""
    return f"event: {name}\ndata: {data}\n\n".encode() if name else f"data: {data}\n\n".encode()


class EventStream(Response):
    """Sends ``events`` as they come, with status 200; several may come at once, and an exception is sent as the last
    one. ``held`` is closed when the stream ends, however it ends. ``deadline``: on the monotonic clock. ``failed`` is
    called with the exception."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], held: contextlib.AsyncExitStack, headers: Mapping[str, str],
        deadline: float, failed: Callable[[Exception], object] = lambda error: None,
    ) -> None:  # fmt: skip
        self.status_code = 200
        self.background = None
        self.events = events
        self.held = held
        self.deadline = deadline
        self.failed = failed
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the end, a failure or the deadline, or until the client has gone."""
        with contextlib.suppress(ClientGone, DeadlineExceeded, OSError):  # the client has gone
            async with self.held, cancel_on_disconnect(receive, self.deadline + GRACE_SECONDS):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                while data := await self._next():
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next(self) -> bytes:
        try:
            return await anext(self.events, b"")
        except Exception as error:  # this ended the generator: the next item is empty
            self.failed(error)
            return event(dumps(errors.told(error).content), "error")


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def listed(tokens: Iterable[int], logprobs: Iterable[float], text_of: Callable[[int], str]) -> dict[str, Any]:
    """OpenAI's ``logprobs``. ``bytes`` is null for a token that is only part of a character."""
    rows = []
    for token, logprob in zip(tokens, logprobs, strict=True):
        text = text_of(token)
        data = None if "\ufffd" in text else list(text.encode())
        rows.append({"token": text, "logprob": max(logprob, LOWEST), "bytes": data, "top_logprobs": []})
    return {"content": rows, "refusal": None}


class ChatCompletion:
    """One answer to one request, with the same ID, time and model in all of its chunks."""

    def __init__(
        self, snapshot: ReleaseSnapshot, text_of: Callable[[int], str] | None, include_usage: bool = False
    ) -> None:
        """``text_of`` names tokens for log-probabilities; None leaves them out."""
        self.text_of = text_of
        self.include_usage = include_usage
        self.common = {
            "id": f"chatcmpl-{os.urandom(12).hex()}", "created": int(time.time()), "model": f"vlm@{snapshot.release}",
            "system_fingerprint": snapshot.vlm_adapter,
        }  # fmt: skip

    def whole(self, replies: Sequence[GenerationResult]) -> dict[str, Any]:
        """The object of answers to one request that are not streamed. The prompt is counted once."""
        choices = [
            {
                "index": index, "message": {"role": "assistant", "content": reply.text, "refusal": None},
                "logprobs": listed(reply.tokens, reply.logprobs, self.text_of) if self.text_of else None,
                "finish_reason": reply.finish,
            }
            for index, reply in enumerate(replies)
        ]  # fmt: skip
        counted = usage(replies[0].prompt_tokens, sum(len(reply.tokens) for reply in replies))
        return {"object": "chat.completion", **self.common, "choices": choices, "usage": counted}

    def first(self) -> bytes:
        """The chunk before any text, with the role."""
        return self._choice({"role": "assistant", "content": ""})

    def chunk(self, chunk: TokenChunk) -> bytes:
        """One chunk; empty without text or log-probabilities."""
        if not chunk.text and not (chunk.tokens and self.text_of):
            return b""
        logprobs = listed(chunk.tokens, chunk.logprobs, self.text_of) if self.text_of else None
        return self._choice({"content": chunk.text}, logprobs)

    def last(self, finish: Finish, prompt: int, completion: int) -> bytes:
        """The end of a stream: finish reason, usage if requested, and [DONE]."""
        counted = self._event([], usage(prompt, completion)) if self.include_usage else b""
        return self._choice({}, finish=finish) + counted + DONE

    def _choice(self, delta: dict[str, str], logprobs: Any = None, finish: Finish | None = None) -> bytes:
        return self._event([{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}])

    def _event(self, choices: list[Any], counted: dict[str, int] | None = None) -> bytes:
        more = {"usage": counted} if self.include_usage else {}
        return event(dumps({"object": "chat.completion.chunk", **self.common, "choices": choices, **more}))
