"""OpenAI's objects for a chat answer, whole and in chunks.

The parts of a chunk that stay the same are written once for each answer; each costs one ``json.dumps``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from serving.engines.vlm.generation import Finish, GenerationResult, TokenChunk
from serving.http.sse import DONE, dumps
from serving.releases.release_snapshot import ReleaseSnapshot

LOWEST = -9999.0
"""Stands for minus infinity, which JSON has not; OpenAI uses the same number."""


def usage(prompt: int, completion: int) -> dict[str, int]:
    """OpenAI's count of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def listed(tokens: Iterable[int], logprobs: Iterable[float], text_of: Callable[[int], str]) -> dict[str, Any]:
    """OpenAI's ``logprobs``. ``bytes`` is null for a token that is only a part of a character."""
    rows = []
    for token, logprob in zip(tokens, logprobs, strict=True):
        text = text_of(token)
        data = None if "\ufffd" in text else list(text.encode())
        rows.append({"token": text, "logprob": max(logprob, LOWEST), "bytes": data, "top_logprobs": []})
    return {"content": rows, "refusal": None}


class ChatCompletion:
    """One answer to one request: its id, its time and its model are the same in all of its chunks."""

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
        head = dumps({"object": "chat.completion.chunk", **self.common})[:-1]
        self._head = f"data: {head},"
        self._delta = f'{self._head}"choices":[{{"index":0,"delta":'
        self._tail = ',"usage":null}\n\n' if include_usage else "}\n\n"
        self._open = f',"logprobs":null,"finish_reason":null}}]{self._tail}'

    def whole(self, reply: GenerationResult) -> dict[str, Any]:
        """The object of an answer that is not streamed."""
        choice = {
            "index": 0, "message": {"role": "assistant", "content": reply.text, "refusal": None},
            "logprobs": listed(reply.tokens, reply.logprobs, self.text_of) if self.text_of else None,
            "finish_reason": reply.finish,
        }  # fmt: skip
        counted = usage(reply.prompt_tokens, len(reply.tokens))
        return {"object": "chat.completion", **self.common, "choices": [choice], "usage": counted}

    def first(self) -> str:
        """The chunk before any text: who speaks."""
        return f'{self._delta}{{"role":"assistant","content":""}}{self._open}'

    def chunk(self, chunk: TokenChunk) -> str:
        """The object of one chunk as JSON; empty when the chunk says nothing."""
        if self.text_of is None:
            return f'{self._delta}{{"content":{dumps(chunk.text)}}}{self._open}' if chunk.text else ""
        if not (chunk.text or chunk.tokens):
            return ""
        scores = dumps(listed(chunk.tokens, chunk.logprobs, self.text_of))
        delta = f'{{"content":{dumps(chunk.text)}}}'
        return f'{self._delta}{delta},"logprobs":{scores},"finish_reason":null}}]{self._tail}'

    def last(self, finish: Finish, prompt: int, completion: int) -> bytes:
        """What ends a stream: why the answer ended, the usage if it was asked for, and [DONE]."""
        end = f'{self._delta}{{}},"logprobs":null,"finish_reason":{dumps(finish)}}}]{self._tail}'
        if self.include_usage:
            end += f'{self._head}"choices":[],"usage":{dumps(usage(prompt, completion))}}}\n\n'
        return end.encode() + DONE
