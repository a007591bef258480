"""Clients that want to take a server from the others. Raw sockets, so that an attack costs its machine little.

Each attack is a coroutine that goes on until it is cancelled and counts what came back: HTTP statuses, ``closed`` (no
answer), ``refused`` (no connection).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import io
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

Counts = Counter[str]
REOPEN_SECONDS = 5.0
"""A connection that was closed is opened again after this long."""
BUFFERED_BYTES = 20_000
"""More than HAProxy waits for before it passes a request on."""
READ_BYTES = 65_536


@dataclass(frozen=True)
class Target:
    """A server, and the address that its attacker has."""

    host: str
    port: int
    source: str = "127.0.0.2"
    counts: Counts = field(default_factory=Counter)
    max_pixels: int = 40_000_000

    async def attempt(self, talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[str]]) -> None:
        """Open a connection, talk, and count how it ended."""
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port, local_addr=(self.source, 0))
        except OSError:
            self.counts["refused"] += 1
            return
        try:
            self.counts[await talk(reader, writer)] += 1
        except (OSError, asyncio.IncompleteReadError):
            self.counts["closed"] += 1
        finally:
            writer.close()


def request(path: str, body: bytes | None = None, declared: int | None = None) -> bytes:
    """A request as it goes over the wire; ``declared``: another length than that of the body."""
    if body is None:
        return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    length = len(body) if declared is None else declared
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}"
    return f"{head}\r\n\r\n".encode() + body


async def status(reader: asyncio.StreamReader) -> str:
    """The status of the next answer, whose body is read; ``closed`` where there is none."""
    head = await reader.readline()
    if not head:
        return "closed"
    length = 0
    while (line := (await reader.readline()).strip().lower()) != b"":
        if line.startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    await reader.readexactly(length)
    return head.split()[1].decode()


async def _each(count: int, one: Callable[[int], Awaitable[None]], pause: float) -> None:
    """``count`` times at once, each again and again."""

    async def loop(number: int) -> None:
        await asyncio.sleep(random.random() * pause)  # noqa: S311  thousands at once would be a load of their own
        while True:
            await one(number)
            await asyncio.sleep(pause)

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(loop(number))


async def without_a_body(target: Target, connections: int = 300) -> None:
    """Headers that announce a body, and nothing more."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        writer.write(request("/v1/embeddings", b"", declared=1000))
        return await status(reader)

    await _each(connections, lambda _: target.attempt(talk), REOPEN_SECONDS)


async def silent(target: Target, connections: int = 4200) -> None:
    """Connections on which nothing is ever sent."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        return await status(reader)

    await _each(connections, lambda _: target.attempt(talk), REOPEN_SECONDS)


async def one_byte_a_second(target: Target, connections: int = 64) -> None:
    """Bodies that come byte by byte; every other one begins with enough to come through HAProxy."""

    async def one(number: int) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
            begun = b" " * (BUFFERED_BYTES if number % 2 else 0)
            writer.write(request("/v1/embeddings", begun, declared=10 * BUFFERED_BYTES))
            answer = asyncio.create_task(status(reader))
            try:
                while not answer.done():
                    writer.write(b" ")
                    await writer.drain()
                    await asyncio.wait([answer], timeout=1.0)
                return answer.result()
            finally:
                answer.cancel()

        await target.attempt(talk)

    await _each(connections, one, REOPEN_SECONDS)


async def picture_bombs(target: Target, connections: int = 32) -> None:
    """Small files of the largest images that the server takes, all at once."""
    uri = "data:image/png;base64," + base64.b64encode(bomb(target.max_pixels)).decode()
    data = request("/v1/embeddings", json.dumps({"input": [{"image": uri}]}).encode())

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        writer.write(data)
        await writer.drain()
        return await status(reader)

    await _each(connections, lambda _: target.attempt(talk), 1.0)


@functools.cache
def bomb(pixels: int) -> bytes:
    """A PNG with an alpha channel and one colour: a few bytes for each thousand pixels."""
    side = max(1, int(pixels**0.5))
    buffer = io.BytesIO()
    Image.new("RGBA", (side, side), (200, 30, 30, 128)).save(buffer, "PNG")
    return buffer.getvalue()


async def health_flood(target: Target, connections: int = 20, per_second: int = 1000) -> None:
    """Probes, one after another on each connection."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        paths = ("/health/ready", "/health/live", "/health/ready/clip", "/health/state")
        count = 0
        while True:
            writer.write(request(paths[count % len(paths)]))
            target.counts[await status(reader)] += 1
            count += 1
            await asyncio.sleep(connections / per_second)

    await _each(connections, lambda _: target.attempt(talk), 1.0)


async def cancelled_requests(target: Target, connections: int = 10, vlm: bool = False) -> None:
    """Requests whose client leaves at once; streams of the VLM where one is served, after their first bytes."""
    chat = {"model": "vlm", "stream": True, "messages": [{"role": "user", "content": "say something long"}]}
    texts = {"input": ["a text that nobody waits for"] * 64}
    data = request("/v1/chat/completions" if vlm else "/v1/embeddings", json.dumps(chat if vlm else texts).encode())

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        writer.write(data)
        await writer.drain()
        if vlm:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(READ_BYTES), 1.0)
        return "left"

    await _each(connections, lambda _: target.attempt(talk), 0.5)


async def fuzzed_sampling(target: Target, requests: int = 10_000, connections: int = 4, seed: int = 0) -> None:
    """Sampling parameters at and beyond the edge of what there is; ends by itself."""
    left = iter(range(requests))
    values = random.Random(seed)  # noqa: S311  always the same ones

    async def one() -> None:
        for _ in left:
            data = request("/v1/chat/completions", json.dumps(sampling(values)).encode())

            async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes = data) -> str:
                writer.write(data)
                return await status(reader)

            await target.attempt(talk)

    async with asyncio.TaskGroup() as group:
        for _ in range(connections):
            group.create_task(one())


EDGES: tuple[Any, ...] = (
    0, 1, -1, 1e-320, 1e-45, 1e-8, 0.5, 1 - 1e-12, 2, 2.0000001, 1e308, -0.0, 2**63, -(2**63), "0.5", None, True, [],
    {},
)  # fmt: skip
FIELDS = (
    "temperature", "top_p", "seed", "frequency_penalty", "presence_penalty", "n", "top_k", "min_p", "stop", "logprobs",
    "top_logprobs", "max_completion_tokens",
)  # fmt: skip


def sampling(values: random.Random) -> dict[str, Any]:
    """A chat of one token with up to four odd fields."""
    odd = {name: values.choice(EDGES) for name in values.sample(FIELDS, values.randint(1, 4))}
    return {"model": "vlm", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1, **odd}
