"""The load generator: a closed loop of clients on raw sockets, at a few tens of microseconds a request.

Run as ``python -m benchmarks.encode.generator``. Reads one JSON object a line, an :class:`Order`, and answers each with
one line, the fields of :class:`LoadResult`.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any
from urllib.parse import urlsplit

from benchmarks.encode.payloads import PICTURES, BodyTemplate, JpegInput, jpegs, text_input
from benchmarks.line_worker import answer, questions
from serving.messages import Modality

TIMEOUT_SECONDS = 300.0
REFUSED_PAUSE_SECONDS = 0.1
"""Pause after an error, so that a server that refuses immediately is not asked a thousand times a second."""
PROBLEMS = 3
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


@dataclass(frozen=True)
class Order:
    """Requests, target and duration."""

    url: str
    template: BodyTemplate
    kind: Modality
    items: int
    concurrency: int
    seconds: float

    @classmethod
    def of(cls, value: dict[str, Any]) -> Order:
        template = value["template"]
        body = BodyTemplate(template["before"], tuple(template["item"]), template["after"])
        return cls(**{**value, "template": body})


@dataclass
class LoadResult:
    """Results of one turn."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    failed: int = 0
    problems: list[str] = field(default_factory=list)
    cpu_seconds: float = 0.0
    """CPU time of the generator itself."""


class Inputs:
    """Numbered inputs; a number is used once in the life of the process."""

    def __init__(self, pictures: int = PICTURES) -> None:
        """``pictures``: number of different ones."""
        self._pictures = [JpegInput(each) for each in jpegs(pictures)]
        self._numbers = count(1)

    def take(self, kind: Modality, items: int) -> Iterator[tuple[bytes, ...]]:
        for _ in range(items):
            number = next(self._numbers)
            if kind == "text":
                yield text_input(number)
            else:
                yield self._pictures[number % len(self._pictures)].numbered(number)


async def run(order: Order, inputs: Inputs) -> LoadResult:
    """Run for ``order.seconds``; requests under way at the end are waited for, and count with their time."""
    result, cpu = LoadResult(), time.process_time()
    began = time.perf_counter()
    clients = (_Client(order, inputs, began + order.seconds, result).loop() for _ in range(order.concurrency))
    await asyncio.gather(*clients)
    result.seconds = time.perf_counter() - began
    result.cpu_seconds = time.process_time() - cpu
    return result


class _Client:
    """A persistent connection that is reopened when the server closes it."""

    def __init__(self, order: Order, inputs: Inputs, end: float, result: LoadResult) -> None:
        self.order = order
        self.inputs = inputs
        self.end = end
        self.result = result
        self.target = urlsplit(order.url)
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def loop(self) -> None:
        while time.perf_counter() < self.end:
            body = self.order.template.parts(list(self.inputs.take(self.order.kind, self.order.items)))
            sent = time.perf_counter()
            try:
                status, answer = await asyncio.wait_for(self._ask(body), TIMEOUT_SECONDS)
                problem = "" if status == 200 else f"{status} {answer[:200].decode(errors='replace')}"
            except (OSError, asyncio.IncompleteReadError, TimeoutError, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
                self._close()
            if not problem:
                self.result.latencies.append(time.perf_counter() - sent)
                continue
            self.result.failed += 1
            if len(self.result.problems) < PROBLEMS:
                self.result.problems.append(problem)
            await asyncio.sleep(REFUSED_PAUSE_SECONDS)
        self._close()

    async def _ask(self, body: list[bytes]) -> tuple[int, bytes]:
        """Status and body of the answer. Raises OSError, IncompleteReadError, and ValueError for another protocol."""
        host, port = self.target.hostname or "127.0.0.1", self.target.port or 80
        if self.streams is None:
            self.streams = await asyncio.open_connection(host, port)
        reader, writer = self.streams
        head = (
            f"POST {self.target.path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {sum(map(len, body))}\r\n\r\n"
        )
        writer.writelines([head.encode(), *body])
        await writer.drain()
        answer = await reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(answer)
        if length is None:
            raise ValueError(f"the answer has no content-length: {answer[:200]!r}")
        content = await reader.readexactly(int(length.group(1)))
        if b"connection: close" in answer.lower():
            self._close()
        return int(answer.split(b" ", 2)[1]), content

    def _close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


def main() -> None:
    inputs = Inputs()
    with asyncio.Runner() as runner:
        for question in questions():
            answer(asdict(runner.run(run(Order.of(question), inputs))))


if __name__ == "__main__":
    main()
