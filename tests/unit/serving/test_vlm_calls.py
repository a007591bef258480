"""Calls to VLM replicas: bounds, deadlines, and what happens when a replica dies. The handle stands for Ray's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from ray.serve.exceptions import BackPressureError

from serving.engines.vlm.generation import GenerationRequest, GenerationResult, Message, TokenChunk
from serving.errors import DeadlineExceeded, InvalidRequest, QueueFull, Unavailable
from serving.http.calls import VlmCalls
from serving.messages import Refusal
from serving.releases.types import ReleaseSnapshot
from tests.support.waiting import until

ASK = GenerationRequest((Message("user", ("is it?",)),))
SNAPSHOT = ReleaseSnapshot(3, None, "i", "t", "vlm-a")
REPLY = GenerationResult("yes", (1,), (-0.1,), 5, "stop")
ONE, LAST = TokenChunk("y", (1,), (-0.1,), 5, 1), TokenChunk("es", (2,), (-0.1,), 5, 2, "stop")


class Response:
    """What a handle returns: awaited, or read chunk by chunk. Exceptions in the script are raised."""

    def __init__(self, script: list[Any]) -> None:
        self.script = script
        self.cancelled = False

    def __await__(self) -> Any:
        return self._next().__await__()

    def __aiter__(self) -> Response:
        return self

    async def __anext__(self) -> Any:
        if not self.script:
            raise StopAsyncIteration
        return await self._next()

    async def _next(self) -> Any:
        await asyncio.sleep(0)
        step = self.script.pop(0)
        if isinstance(step, BaseException):
            raise step
        if callable(step):
            return await step()
        return step

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Plays one script per call, and remembers the responses."""

    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts = list(scripts)
        self.made: list[Response] = []
        self.asked: list[tuple[Any, ...]] = []

    def options(self, stream: bool) -> Handle:
        assert stream
        return self

    def __getattr__(self, _method: str) -> Handle:
        return self

    def remote(self, *arguments: Any) -> Response:
        self.asked.append(arguments)
        self.made.append(Response(self.scripts.pop(0)))
        return self.made[-1]


def soon() -> float:
    return time.monotonic() + 60


async def texts(calls: VlmCalls, deadline: float | None = None) -> list[str]:
    return [chunk.text async for chunk in calls.stream(ASK, SNAPSHOT, deadline or soon())]


async def never() -> None:
    await asyncio.Event().wait()


async def test_the_stamps_adapter_is_asked() -> None:
    handle = Handle([REPLY], [ONE, LAST], [[-1.0, -2.0]])
    calls = VlmCalls(handle, limit=8)  # type: ignore[arg-type]
    assert await calls.reply(ASK, SNAPSHOT, soon()) == REPLY
    assert await texts(calls) == ["y", "es"]
    assert await calls.score(ASK, ["yes", "no"], SNAPSHOT, soon()) == [-1.0, -2.0]
    assert [arguments[-2] for arguments in handle.asked] == ["vlm-a"] * 3
    assert calls.running == 0


async def test_replicas_get_the_time_left_because_their_clocks_may_differ() -> None:
    handle = Handle([REPLY], [LAST], [[-1.0]])
    calls = VlmCalls(handle, limit=8)  # type: ignore[arg-type]
    await calls.reply(ASK, SNAPSHOT, soon())
    await texts(calls)
    await calls.score(ASK, ["yes"], SNAPSHOT, soon())
    assert all(0 < arguments[-1] <= 60 for arguments in handle.asked)


async def test_a_reply_whose_replica_died_is_asked_again() -> None:
    calls = VlmCalls(Handle([RuntimeError("replica died")], [REPLY]), limit=8)  # type: ignore[arg-type]
    assert await calls.reply(ASK, SNAPSHOT, soon()) == REPLY


async def test_a_stream_is_asked_again_before_its_first_chunk_and_broken_off_after_it() -> None:
    calls = VlmCalls(Handle([RuntimeError("died")], [ONE, LAST]), limit=8)  # type: ignore[arg-type]
    assert await texts(calls) == ["y", "es"]
    handle = Handle([ONE, RuntimeError("died")], [ONE, LAST])
    with pytest.raises(Unavailable, match="broke off"):
        await texts(VlmCalls(handle, limit=8))  # type: ignore[arg-type]
    assert len(handle.made) == 1


async def test_a_stream_that_ends_without_its_last_chunk_is_no_answer() -> None:
    with pytest.raises(Unavailable, match="broke off"):
        await texts(VlmCalls(Handle([ONE]), limit=8))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("refusal", "error"),
    [(Refusal("ask", "too long.", "cut it"), InvalidRequest), (Refusal("late", "late."), DeadlineExceeded),
     (Refusal("adapter", "its file is damaged."), Unavailable)],
)  # fmt: skip
async def test_refusals_are_raised_here(refusal: Refusal, error: type[Exception]) -> None:
    with pytest.raises(error):
        await VlmCalls(Handle([refusal], [refusal], [refusal]), limit=8).reply(ASK, SNAPSHOT, soon())  # type: ignore[arg-type]
    with pytest.raises(error):
        await texts(VlmCalls(Handle([ONE, refusal]), limit=8))  # type: ignore[arg-type]


async def test_more_than_the_limit_is_overload_but_a_health_check_gets_in() -> None:
    handle = Handle([never], [REPLY], [BackPressureError(1, 1)])
    calls = VlmCalls(handle, limit=1)  # type: ignore[arg-type]
    waiting = asyncio.create_task(calls.reply(ASK, SNAPSHOT, soon()))
    await until(lambda: handle.made)
    with pytest.raises(QueueFull):
        await calls.reply(ASK, SNAPSHOT, soon())
    with pytest.raises(QueueFull):
        await texts(calls)
    await calls.probe(SNAPSHOT, soon())
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    assert handle.made[0].cancelled
    with pytest.raises(QueueFull):
        await calls.reply(ASK, SNAPSHOT, soon())
    assert calls.running == 0


async def test_a_probe_of_a_busy_replica_is_answered_as_a_full_queue_is() -> None:
    calls = VlmCalls(Handle([Refusal("busy", "it answers others")]), limit=1)  # type: ignore[arg-type]
    with pytest.raises(QueueFull):
        await calls.probe(SNAPSHOT, soon())


@pytest.mark.parametrize("stream", [True, False])
async def test_after_the_deadline_it_is_late_or_says_what_went_wrong(stream: bool) -> None:
    async def go(*scripts: list[Any]) -> Handle:
        handle = Handle(*scripts)
        calls = VlmCalls(handle, limit=8)  # type: ignore[arg-type]
        end = time.monotonic() + 0.1
        await (texts(calls, end) if stream else calls.reply(ASK, SNAPSHOT, end))
        return handle

    with pytest.raises(DeadlineExceeded):
        await go([never])
    died: Callable[[], list[Any]] = lambda: [RuntimeError("engine died")]  # noqa: E731
    with pytest.raises(Unavailable, match="engine died"):
        await go(*(died() for _ in range(20)))


async def test_closing_a_stream_cancels_it_in_the_replica() -> None:
    handle = Handle([ONE, never])
    calls = VlmCalls(handle, limit=8)  # type: ignore[arg-type]
    stream = calls.stream(ASK, SNAPSHOT, soon())
    assert await anext(stream) == ONE
    await stream.aclose()  # type: ignore[attr-defined]
    assert handle.made[0].cancelled
    assert calls.running == 0
