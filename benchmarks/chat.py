"""A closed loop of chat clients, each of which sends its next request when it has its answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

TIMEOUT_SECONDS = 120.0


@dataclass
class ChatRun:
    """Results of one run, or of several that were added up. Times are seconds."""

    seconds: float = 0.0
    answered: int = 0
    problems: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    """From sending a request to its first token (streaming), or to its answer."""
    answers: dict[int, str] = field(default_factory=dict)
    """By number of the request's body."""

    def add(self, other: ChatRun) -> None:
        self.seconds += other.seconds
        self.answered += other.answered
        self.problems += other.problems
        self.first += other.first
        self.answers |= other.answers

    @property
    def rate(self) -> float:
        return self.answered / self.seconds if self.seconds else 0.0

    @property
    def first_seconds(self) -> float:
        return float(np.median(self.first)) if self.first else float("nan")


def closed_loop(url: str, bodies: Sequence[dict[str, Any]], concurrency: int, seconds: float, stream: bool) -> ChatRun:
    """Run for this many seconds; requests under way at the end are waited for, and count with their time."""
    asked = [json.dumps({**body, "stream": stream}).encode() for body in bodies]
    return asyncio.run(_run(url, asked, concurrency, seconds, stream))


async def _run(url: str, bodies: Sequence[bytes], concurrency: int, seconds: float, stream: bool) -> ChatRun:
    made = ChatRun()
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SECONDS, limits=limits, trust_env=False) as client:
        began = time.perf_counter()

        async def one(start: int) -> None:
            count = start
            while time.perf_counter() - began < seconds:
                await _ask(client, count % len(bodies), bodies[count % len(bodies)], stream, made)
                count += concurrency

        await asyncio.gather(*(one(start) for start in range(concurrency)))
        made.seconds = time.perf_counter() - began
    return made


async def _ask(client: httpx.AsyncClient, number: int, body: bytes, stream: bool, made: ChatRun) -> None:
    sent = time.perf_counter()
    try:
        if stream:
            text, first = await _streamed(client, body)
        else:
            answer = await client.post(_PATH, content=body, headers=_HEADERS)
            answer.raise_for_status()
            text, first = answer.json()["choices"][0]["message"]["content"], time.perf_counter()
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        made.problems.append(f"{type(error).__name__}: {str(error)[:200]}")
        return
    made.answered += 1
    made.first.append(first - sent)
    made.answers[number] = text


async def _streamed(client: httpx.AsyncClient, body: bytes) -> tuple[str, float]:
    parts: list[str] = []
    first = 0.0
    async with client.stream("POST", _PATH, content=body, headers=_HEADERS) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                text = choice["delta"].get("content")
                if text:
                    first = first or time.perf_counter()
                    parts.append(text)
    return "".join(parts), first or time.perf_counter()


_PATH = "/v1/chat/completions"
_HEADERS = {"content-type": "application/json"}
