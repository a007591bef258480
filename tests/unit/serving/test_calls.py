"""Calls to replicas and controllers through a scripted handle: time limits, retries, and broadcasts."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import numpy as np
import pytest
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from core.errors import ReleaseConflict, ReleaseError
from serving.app import drain
from serving.engines.vlm.generation import GenerationRequest, GenerationResult, Message, TokenChunk
from serving.errors import AdapterUnservable, DeadlineExceeded, InvalidRequest, QueueFull, Unavailable, WrongSpace
from serving.http import calls as module
from serving.http import clip_vectors
from serving.http.calls import CatalogCalls, ControllerCalls, VlmCalls
from serving.http.clip_vectors import EncoderCalls
from serving.http.errors import ApiError
from serving.messages import EncodeResult, Refusal
from serving.ray.deployment_status import DeploymentStatus
from serving.ray.replica_calls import Attempts, call_every_replica, call_replica
from serving.releases.types import HoldCommand, ReleaseCommand, ReleaseResult, ReleaseSnapshot, RollbackCommand
from tests.support.waiting import until
from tests.unit.serving.scripted_vlms import app_state

ASK = GenerationRequest((Message("user", ("is it?",)),))
VLM_STAMP = ReleaseSnapshot(3, None, "i", "t", "vlm-a")
REPLY = GenerationResult("yes", (1,), (-0.1,), 5, "stop")
ONE, LAST = TokenChunk("y", (1,), (-0.1,), 5, 1), TokenChunk("es", (2,), (-0.1,), 5, 2, "stop")
DIED, FULL = RuntimeError("replica died"), BackPressureError(1, 1)


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
        return await step() if callable(step) else step

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Plays one script per call, whatever the method, and records the responses."""

    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts = list(scripts)
        self.made: list[Response] = []
        self.asked: list[tuple[Any, ...]] = []

    def options(self, stream: bool) -> Handle:
        assert stream
        return self

    def __getattr__(self, _method: str) -> Any:
        return self

    def remote(self, *arguments: Any) -> Response:
        self.asked.append(arguments)
        self.made.append(Response(self.scripts.pop(0)))
        return self.made[-1]


def vlm(*scripts: list[Any], limit: int = 8) -> tuple[VlmCalls, Handle]:
    handle: Any = Handle(*scripts)
    return VlmCalls(handle, limit), handle


def soon() -> float:
    return time.monotonic() + 60


async def texts(calls: VlmCalls, deadline: float | None = None) -> list[str]:
    return [chunk.text async for chunk in calls.stream(ASK, VLM_STAMP, deadline or soon())]


async def never() -> None:
    await asyncio.Event().wait()


async def test_the_stamps_adapter_is_asked_with_the_time_left_because_clocks_may_differ() -> None:
    calls, handle = vlm([REPLY], [ONE, LAST], [[-1.0, -2.0]])
    assert await calls.reply(ASK, VLM_STAMP, soon()) == REPLY
    assert await texts(calls) == ["y", "es"]
    assert await calls.score(ASK, ["yes", "no"], VLM_STAMP, soon()) == [-1.0, -2.0]
    for *_, adapter, left in handle.asked:
        assert adapter == "vlm-a" and 0 < left <= 60
    assert calls.running == 0


async def test_an_answer_whose_replica_died_is_asked_again_and_a_stream_after_its_first_chunk_is_broken_off() -> None:
    calls, _ = vlm([DIED], [REPLY], [DIED], [ONE, LAST])
    assert (await calls.reply(ASK, VLM_STAMP, soon()), await texts(calls)) == (REPLY, ["y", "es"])
    for script in ([ONE, DIED], [ONE]):  # the second ended without its last chunk
        calls, handle = vlm(script, [ONE, LAST])
        with pytest.raises(Unavailable, match="broke off"):
            await texts(calls)
        assert len(handle.made) == 1


@pytest.mark.parametrize(
    ("refusal", "error"),
    [(Refusal("ask", "too long.", "cut it"), InvalidRequest), (Refusal("late", "late."), DeadlineExceeded),
     (Refusal("adapter", "its file is damaged."), Unavailable), (Refusal("busy", "it answers others"), QueueFull)],
)  # fmt: skip
async def test_refusals_are_raised_here(refusal: Refusal, error: type[Exception]) -> None:
    calls, _ = vlm([refusal], [refusal], [refusal])
    with pytest.raises(error):
        await calls.probe(VLM_STAMP, soon())
    calls, _ = vlm([ONE, refusal])
    with pytest.raises(error if refusal.code != "busy" else Unavailable):
        await texts(calls)


async def test_more_than_the_limit_is_overload_but_a_health_check_gets_in() -> None:
    calls, handle = vlm([never], [REPLY], [FULL], limit=1)
    waiting = asyncio.create_task(calls.reply(ASK, VLM_STAMP, soon()))
    await until(lambda: handle.made)
    for refused in (calls.reply(ASK, VLM_STAMP, soon()), texts(calls)):
        with pytest.raises(QueueFull):
            await refused
    await calls.probe(VLM_STAMP, soon())
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    assert handle.made[0].cancelled
    with pytest.raises(QueueFull):
        await calls.reply(ASK, VLM_STAMP, soon())
    assert calls.running == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_after_the_deadline_it_is_late_or_says_what_went_wrong(stream: bool) -> None:
    for scripts, error, told in (([[never]], DeadlineExceeded, ""), ([[DIED]] * 20, Unavailable, "replica died")):
        calls, handle = vlm(*map(list, scripts))
        end = time.monotonic() + 0.1
        with pytest.raises(error, match=told):
            await (texts(calls, end) if stream else calls.reply(ASK, VLM_STAMP, end))
        assert told or handle.made[0].cancelled


async def test_closing_a_stream_cancels_it_in_the_replica() -> None:
    calls, handle = vlm([ONE, never])
    stream = calls.stream(ASK, VLM_STAMP, soon())
    assert await anext(stream) == ONE
    await stream.aclose()  # type: ignore[attr-defined]
    assert (handle.made[0].cancelled, calls.running) == (True, 0)


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


async def test_a_full_queue_is_refused_at_once_or_tried_again_and_a_replica_that_died_too() -> None:
    with pytest.raises(QueueFull):
        await call_replica(Handle([FULL]).remote, Attempts(60, "encoder"))
    handle: Any = Handle([FULL], [DIED], [{"rows": 1}])
    assert await CatalogCalls(handle, 60.0).status() == {"rows": 1}


async def test_a_broadcast_is_made_again_until_every_replica_answered() -> None:
    handle: Any = Rounds(RuntimeError("no replica yet"), [], [1, DIED], [1, 2])
    assert await call_every_replica(handle, "adopt", seconds=60) == [1, 2]
    broken: Any = Rounds(*[[DIED]] * 20)
    with pytest.raises(ReleaseError, match=r"not every replica answered 'adopt': RuntimeError: replica died"):
        await call_every_replica(broken, "adopt", seconds=0.05)


async def test_a_drain_ends_when_no_request_is_in_flight_or_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    for rounds, seconds, drained in (
        ([[{3: 1}, {}], [{}, {3: 2}], [{}, {}]], 60, True), ([[{3: 1}]] * 1000, 0.2, False),
    ):  # fmt: skip
        handle = Rounds(*rounds)
        monkeypatch.setattr(serve, "get_deployment_handle", lambda name, app, handle=handle: handle)
        async with asyncio.timeout(30):
            assert await drain(seconds) is drained
        assert (handle.rounds == []) is drained


def encoders(*answers: EncodeResult, max_batch: int = 16) -> tuple[EncoderCalls, Handle]:
    handle: Any = Handle(*([[answer]] for answer in answers))
    return EncoderCalls(handle, max_batch), handle


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
    for ([call],) in handle.asked:
        *_, caller, left = call
        assert caller == "key:7" and 0 < left <= 60


class Encoders:
    """Answers each call when it is told to."""

    def __init__(self) -> None:
        self.calls: list[list[Any]] = []
        self.answers: list[asyncio.Future[list[EncodeResult]]] = []
        self.encode = self

    def remote(self, calls: list[Any]) -> asyncio.Future[list[EncodeResult]]:
        self.calls.append(calls)
        self.answers.append(asyncio.get_running_loop().create_future())
        return self.answers[-1]

    def answer(self, number: int) -> None:
        rows = [np.full((1, 2), float(payload[0][0]), np.float32) for _, payload, *_ in self.calls[number]]
        self.answers[number].set_result([EncodeResult(each, "clip-a", "i", "t") for each in rows])

    async def until(self, count: int) -> None:
        async with asyncio.timeout(30):
            while len(self.calls) < count:
                await asyncio.sleep(0)


async def test_requests_that_wait_share_a_call_and_each_keeps_its_answer_its_deadline_and_its_cancellation() -> None:
    handle: Any = Encoders()
    calls = EncoderCalls(handle, 16)
    asked = []
    for number in range(2):
        asked.append(asyncio.create_task(calls.encode("text", [[number]], SNAPSHOT, soon(), "a")))
        await handle.until(number + 1)
    asked += [
        asyncio.create_task(calls.encode("text", [[number]], SNAPSHOT, soon(), "ab"[number % 2]))
        for number in range(2, 7)
    ]
    late = asyncio.create_task(calls.encode("text", [[7]], SNAPSHOT, time.monotonic() + 0.01, "a"))
    with pytest.raises(DeadlineExceeded):
        await late
    asked[3].cancel()
    await asyncio.sleep(0)
    handle.answer(0)
    await handle.until(3)
    assert [len(each) for each in handle.calls] == [1, 1, 4]
    assert sorted(payload[0][0] for _, payload, *_ in handle.calls[2]) == [2, 4, 5, 6]
    for number in (1, 2):
        handle.answer(number)
    for number in (0, 1, 2, 4, 5, 6):
        vectors = (await asked[number]).vectors
        assert vectors is not None and vectors[0, 0] == number


async def test_calls_of_one_kind_do_not_wait_for_those_of_another_nor_for_one_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clip_vectors, "PATIENCE_SECONDS", 0.02)
    handle: Any = Encoders()
    calls = EncoderCalls(handle, 16)
    asked = []
    for number in range(2):
        asked.append(asyncio.create_task(calls.encode("text", [[number]], SNAPSHOT, soon())))
        await handle.until(number + 1)
    picture = asyncio.create_task(calls.encode("image", np.full((1, 1, 1, 3), 9, np.uint8), SNAPSHOT, soon()))
    await handle.until(3)
    third = asyncio.create_task(calls.encode("text", [[5]], SNAPSHOT, soon()))
    async with asyncio.timeout(30):
        await handle.until(4)
    for task in (*asked, picture, third):
        task.cancel()


async def test_a_clock_that_is_set_ends_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    deadline = app_state(None).deadline()
    monkeypatch.setattr("time.time", lambda: 4e9)
    calls, _ = encoders(GOOD)
    assert (await calls.encode("text", [[1]], SNAPSHOT, deadline)).vectors is VECTOR


ROLLBACK = RollbackCommand(actor="ann", reason="r", expected_live=2)
RELEASE = ReleaseCommand(adapters={"clip": "a"}, actor="ann", reason="r", expected_live=2)
OUTCOME = ReleaseResult(3, None, None, "rollback", "clip", 1, 0.0, 0.0, 1)


def controllers(*answers: Any) -> ControllerCalls:
    """Controllers that answer one after the other; an exception stands for one that dies."""
    handle: Any = Handle(*([answer] for answer in answers))
    return ControllerCalls(handle)


async def test_a_rollback_is_asked_of_another_controller_when_one_dies_and_a_release_is_not() -> None:
    conflict = AsyncMock(return_value=ReleaseConflict("release 3 is live, not 2", "look"))
    assert await controllers(RayActorError(), OUTCOME).change(ROLLBACK) == OUTCOME
    with pytest.raises(Unavailable, match="ended during the call, and now release 3 is live"):  # it may be carried out
        await controllers(RayActorError(), conflict).change(ROLLBACK)
    with pytest.raises(Unavailable, match="ended during the call"):
        await controllers(RayActorError(), OUTCOME).change(RELEASE)
    await controllers(RayActorError(), None).hold(HoldCommand(actor="ann", reason="incident"))
    assert await controllers(RayActorError(), {"started": True}).status() == {"started": True}


async def test_a_controller_that_stands_still_is_named_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONTROLLER_SECONDS", 0.05)
    for command in (ROLLBACK, RELEASE):
        with pytest.raises(Unavailable, match=r"the release controller has not answered for 0\.05 s"):
            await asyncio.wait_for(controllers(never, never).change(command), 30)


async def test_a_long_release_is_waited_for_while_its_controller_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONTROLLER_SECONDS", 0.02)
    prepared, looks = asyncio.Event(), 0

    async def change(_: Any) -> ReleaseResult:
        await prepared.wait()
        return OUTCOME

    async def status() -> dict[str, Any]:
        nonlocal looks
        looks += 1
        if looks == 3:
            prepared.set()
        return {}

    handle: Any = SimpleNamespace(change=SimpleNamespace(remote=change), status=SimpleNamespace(remote=status))
    assert await ControllerCalls(handle).change(RELEASE) == OUTCOME


STARTING = "the VLM is starting."
RUNNING = DeploymentStatus({"RUNNING": 1}, False, "")


async def test_a_vlm_start_problem_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.001)
    statuses: list[DeploymentStatus | None] = [None]
    looks: list[DeploymentStatus | None] = []
    handle: Any = Handle()
    vlms = VlmCalls(handle, 1, lambda: looks.append(statuses[-1]) or statuses[-1])
    assert vlms.start_problem == STARTING
    waiting = asyncio.create_task(vlms.wait_started())
    await until(lambda: len(looks) > 1)
    assert vlms.start_problem == STARTING
    statuses.append(DeploymentStatus({"STARTING": 1}, False, "MemoryError: no room"))
    await until(lambda: len(looks) > 5)
    assert vlms.start_problem == "the VLM is starting again, after it failed: MemoryError: no room"
    assert [record.levelname for record in caplog.records] == ["ERROR"]  # once, not with each look
    statuses.append(RUNNING)
    await waiting
    assert vlms.start_problem == ""


async def test_a_new_process_knows_at_once_that_the_vlm_runs_and_a_serve_that_does_not_answer_holds_up_nothing() -> (
    None
):
    hangs, handle = threading.Event(), Handle()
    for read, seconds, problem in ((lambda: RUNNING, 60, ""), (lambda: hangs.wait() and None, 0.01, STARTING)):
        vlms = VlmCalls(handle, 1, read)  # type: ignore[arg-type]
        await vlms.look(seconds)
        assert vlms.start_problem == problem
    hangs.set()
