"""Calls to replicas through Ray's real handle: timeouts, retries, and broadcasts that reach every replica."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from ray.serve.exceptions import BackPressureError

from core.errors import ReleaseError
from serving.engines.vlm.generation import GenerationRequest, GenerationResult, Message, TokenChunk
from serving.errors import AdapterUnservable, DeadlineExceeded, InvalidRequest, QueueFull, Unavailable, WrongSpace
from serving.http.calls import CatalogCalls, VlmCalls
from serving.http.clip_vectors import EncoderCalls
from serving.http.errors import ApiError
from serving.messages import EncodeResult, Refusal
from serving.ray.replica_calls import Attempts, call_every_replica, call_replica
from serving.releases.types import ReleaseSnapshot
from tests.support.waiting import until
from tests.unit.serving.scripted_vlms import app_state

ASK = GenerationRequest((Message("user", ("is it?",)),))
VLM_STAMP = ReleaseSnapshot(3, None, "i", "t", "vlm-a")
REPLY = GenerationResult("yes", (1,), (-0.1,), 5, "stop")
ONE, LAST = TokenChunk("y", (1,), (-0.1,), 5, 1), TokenChunk("es", (2,), (-0.1,), 5, 2, "stop")


class Response:
    """Result of a handle: awaited, or read chunk by chunk. Exceptions in the script are raised."""

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
    """Plays one script per call, and records the responses."""

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
    return [chunk.text async for chunk in calls.stream(ASK, VLM_STAMP, deadline or soon())]


async def never() -> None:
    await asyncio.Event().wait()


async def test_the_stamps_adapter_is_asked_with_the_time_left_because_clocks_may_differ() -> None:
    handle = Handle([REPLY], [ONE, LAST], [[-1.0, -2.0]])
    calls = VlmCalls(handle, limit=8)
    assert await calls.reply(ASK, VLM_STAMP, soon()) == REPLY
    assert await texts(calls) == ["y", "es"]
    assert await calls.score(ASK, ["yes", "no"], VLM_STAMP, soon()) == [-1.0, -2.0]
    for *_, adapter, left in handle.asked:
        assert adapter == "vlm-a" and 0 < left <= 60
    assert calls.running == 0


async def test_a_reply_whose_replica_died_is_asked_again() -> None:
    calls = VlmCalls(Handle([RuntimeError("replica died")], [REPLY]), limit=8)
    assert await calls.reply(ASK, VLM_STAMP, soon()) == REPLY


async def test_a_stream_is_asked_again_before_its_first_chunk_and_broken_off_after_it() -> None:
    calls = VlmCalls(Handle([RuntimeError("died")], [ONE, LAST]), limit=8)
    assert await texts(calls) == ["y", "es"]
    handle = Handle([ONE, RuntimeError("died")], [ONE, LAST])
    with pytest.raises(Unavailable, match="broke off"):
        await texts(VlmCalls(handle, limit=8))
    assert len(handle.made) == 1
    with pytest.raises(Unavailable, match="broke off"):  # it ended without its last chunk
        await texts(VlmCalls(Handle([ONE]), limit=8))


@pytest.mark.parametrize(
    ("refusal", "error"),
    [(Refusal("ask", "too long.", "cut it"), InvalidRequest), (Refusal("late", "late."), DeadlineExceeded),
     (Refusal("adapter", "its file is damaged."), Unavailable)],
)  # fmt: skip
async def test_refusals_are_raised_here(refusal: Refusal, error: type[Exception]) -> None:
    with pytest.raises(error):
        await VlmCalls(Handle([refusal], [refusal], [refusal]), limit=8).reply(ASK, VLM_STAMP, soon())
    with pytest.raises(error):
        await texts(VlmCalls(Handle([ONE, refusal]), limit=8))


async def test_more_than_the_limit_is_overload_but_a_health_check_gets_in() -> None:
    handle = Handle([never], [REPLY], [BackPressureError(1, 1)])
    calls = VlmCalls(handle, limit=1)
    waiting = asyncio.create_task(calls.reply(ASK, VLM_STAMP, soon()))
    await until(lambda: handle.made)
    with pytest.raises(QueueFull):
        await calls.reply(ASK, VLM_STAMP, soon())
    with pytest.raises(QueueFull):
        await texts(calls)
    await calls.probe(VLM_STAMP, soon())
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    assert handle.made[0].cancelled
    with pytest.raises(QueueFull):
        await calls.reply(ASK, VLM_STAMP, soon())
    assert calls.running == 0


async def test_a_probe_of_a_busy_replica_is_answered_as_a_full_queue_is() -> None:
    calls = VlmCalls(Handle([Refusal("busy", "it answers others")]), limit=1)
    with pytest.raises(QueueFull):
        await calls.probe(VLM_STAMP, soon())


@pytest.mark.parametrize("stream", [True, False])
async def test_after_the_deadline_it_is_late_or_says_what_went_wrong(stream: bool) -> None:
    async def go(*scripts: list[Any]) -> Handle:
        handle = Handle(*scripts)
        calls = VlmCalls(handle, limit=8)
        end = time.monotonic() + 0.1
        await (texts(calls, end) if stream else calls.reply(ASK, VLM_STAMP, end))
        return handle

    with pytest.raises(DeadlineExceeded):
        await go([never])
    died: Callable[[], list[Any]] = lambda: [RuntimeError("engine died")]  # noqa: E731
    with pytest.raises(Unavailable, match="engine died"):
        await go(*(died() for _ in range(20)))


async def test_closing_a_stream_cancels_it_in_the_replica() -> None:
    handle = Handle([ONE, never])
    calls = VlmCalls(handle, limit=8)
    stream = calls.stream(ASK, VLM_STAMP, soon())
    assert await anext(stream) == ONE
    await stream.aclose()  # type: ignore[attr-defined]
    assert handle.made[0].cancelled
    assert calls.running == 0


SNAPSHOT = ReleaseSnapshot(3, "clip-a", "i", "t")
VECTOR = np.ones((1, 4), np.float32)
GOOD = EncodeResult(VECTOR, "clip-a", "i", "t")
STRAY = EncodeResult(VECTOR * 2, "clip-a", "i", "other")


def refused(code: str) -> EncodeResult:
    return EncodeResult(None, "clip-a", code=code, error="why")


class Rounds:
    """A handle whose broadcasts return the lists of results in order; an exception is raised."""

    def __init__(self, *rounds: Any) -> None:
        self.rounds = list(rounds)

    def broadcast(self, method: str, *args: Any) -> Any:
        self.current = self.rounds.pop(0)
        if isinstance(self.current, Exception):
            raise self.current
        return self

    async def results_async(self, return_exceptions: bool) -> list[Any]:
        assert return_exceptions
        return list(self.current)


async def test_a_full_queue_is_refused_at_once_or_tried_again() -> None:
    full = BackPressureError(1, 1)
    with pytest.raises(QueueFull):
        await call_replica(Handle([full]).remote, Attempts(60, "encoder"))
    assert await call_replica(Handle([full], ["rows"]).remote, Attempts(60, "catalog"), retry_full=True) == "rows"


async def test_when_the_time_is_over_the_last_failure_is_named() -> None:
    handle = Handle(*[[RuntimeError("replica died")] for _ in range(20)])
    with pytest.raises(Unavailable, match=r"no encoder answered .*replica died"):
        await call_replica(handle.remote, Attempts(0.05, "encoder"))
    waiting = Handle([never])
    with pytest.raises(DeadlineExceeded, match="Send less"):
        await call_replica(waiting.remote, Attempts(0.01, "encoder", "Send less."))
    assert waiting.made[0].cancelled


async def test_a_broadcast_is_made_again_until_every_replica_answered() -> None:
    handle: Any = Rounds(RuntimeError("no replica yet"), [], [1, RuntimeError("died")], [1, 2])
    assert await call_every_replica(handle, "adopt", seconds=60) == [1, 2]
    broken: Any = Rounds(*[[RuntimeError("died")]] * 20)
    with pytest.raises(ReleaseError, match=r"not every replica answered 'adopt': RuntimeError: died"):
        await call_every_replica(broken, "adopt", seconds=0.05)


def encoders(*answers: EncodeResult, max_batch: int = 16) -> tuple[EncoderCalls, Handle]:
    handle = Handle(*([answer] for answer in answers))
    return EncoderCalls(handle, max_batch), handle  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [refused("adapter"), refused("failed"), STRAY])
async def test_an_encoder_that_cannot_do_it_or_is_of_another_space_is_followed_by_another(bad: EncodeResult) -> None:
    calls, _ = encoders(bad, GOOD)
    assert (await calls.encode("text", [[1]], SNAPSHOT, soon())).vectors is VECTOR


@pytest.mark.parametrize(
    ("answer", "error"),
    [(refused("late"), DeadlineExceeded), (refused("adapter"), AdapterUnservable), (refused("failed"), Unavailable),
     (STRAY, WrongSpace), (EncodeResult(VECTOR * np.nan, "clip-a", "i", "t"), ApiError)],
)  # fmt: skip
async def test_what_no_encoder_can_answer_is_an_error(answer: EncodeResult, error: type[Exception]) -> None:
    calls, _ = encoders(*[answer] * 3)
    with pytest.raises(error):
        await calls.encode("text", [[1]], SNAPSHOT, soon())


async def test_pieces_of_a_large_request_are_joined_in_order_and_each_has_its_turn_and_the_time_left() -> None:
    calls, handle = encoders(*(EncodeResult(VECTOR * number, "clip-a", "i", "t") for number in range(3)), max_batch=2)
    joined = await calls.encode("image", np.zeros((5, 1, 1, 3), np.uint8), SNAPSHOT, soon(), "key:7")
    assert joined.vectors is not None
    assert joined.vectors[:, 0].tolist() == [0.0, 1.0, 2.0]
    for *_, caller, left in handle.asked:
        assert caller == "key:7" and 0 < left <= 60


async def test_a_search_is_asked_again_when_the_catalog_is_replaced() -> None:
    calls = CatalogCalls(Handle([RuntimeError("replica died")], [{"rows": 1}]), 60.0)  # type: ignore[arg-type]
    assert await calls.status() == {"rows": 1}


async def test_a_clock_that_is_set_ends_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    deadline = app_state(None).deadline()
    monkeypatch.setattr("time.time", lambda: 4e9)
    calls, _ = encoders(GOOD)
    assert (await calls.encode("text", [[1]], SNAPSHOT, deadline)).vectors is VECTOR
