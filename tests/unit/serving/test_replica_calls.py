"""Calls to replicas: bounds of time, what is tried again, and broadcasts that reach every one. The handle is Ray's."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from ray.serve.exceptions import BackPressureError

from core.errors import ReleaseError
from serving.errors import AdapterUnservable, DeadlineExceeded, QueueFull, Unavailable, WrongSpace
from serving.http.calls import CatalogCalls
from serving.http.clip_vectors import EncoderCalls
from serving.http.errors import ApiError
from serving.messages import EncodeResult
from serving.ray.replica_calls import Attempts, call_every_replica, call_replica
from serving.releases.types import ReleaseSnapshot
from tests.unit.serving.scripted_vlms import app_state
from tests.unit.serving.test_vlm_calls import Handle, never

SNAPSHOT = ReleaseSnapshot(3, "clip-a", "i", "t")
VECTOR = np.ones((1, 4), np.float32)


class Rounds:
    """A handle whose broadcasts return one list of results after the other; an exception is raised."""

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


@pytest.mark.parametrize(
    ("code", "error"), [("late", DeadlineExceeded), ("adapter", AdapterUnservable), ("failed", Unavailable)]
)
async def test_an_encoders_refusal_is_raised(code: str, error: type[Exception]) -> None:
    refusals = [[EncodeResult(None, "clip-a", code=code, error="why")] for _ in range(3)]
    calls = EncoderCalls(Handle(*refusals), 16)  # type: ignore[arg-type]
    with pytest.raises(error):
        await calls.encode("text", [[1]], SNAPSHOT, time.monotonic() + 60)


@pytest.mark.parametrize("code", ["adapter", "failed"])
async def test_an_encoder_that_cannot_do_it_is_followed_by_another_one(code: str) -> None:
    handle = Handle([EncodeResult(None, "clip-a", code=code, error="why")], [EncodeResult(VECTOR, "clip-a", "i", "t")])
    result = await EncoderCalls(handle, 16).encode("text", [[1]], SNAPSHOT, time.monotonic() + 60)  # type: ignore[arg-type]
    assert result.vectors is VECTOR


async def test_an_encoder_that_answers_in_another_space_is_followed_by_another_one() -> None:
    stray = EncodeResult(VECTOR * 2, "clip-a", "i", "other")
    handle: Any = Handle([stray], [EncodeResult(VECTOR, "clip-a", "i", "t")])
    result = await EncoderCalls(handle, 16).encode("text", [[1]], SNAPSHOT, time.monotonic() + 60)
    assert result.vectors is VECTOR
    strays: Any = Handle(*[[stray] for _ in range(3)])
    with pytest.raises(WrongSpace, match="other"):
        await EncoderCalls(strays, 16).encode("text", [[1]], SNAPSHOT, time.monotonic() + 60)


async def test_values_that_are_not_finite_are_an_error() -> None:
    handle: Any = Handle([EncodeResult(VECTOR * np.nan, "clip-a", "i", "t")])
    with pytest.raises(ApiError, match="not finite"):
        await EncoderCalls(handle, 16).encode("text", [[1]], SNAPSHOT, time.monotonic() + 60)


async def test_items_of_a_large_request_are_joined_in_order() -> None:
    results = [[EncodeResult(VECTOR * number, "clip-a", "i", "t")] for number in range(3)]
    handle = Handle(*results)
    calls = EncoderCalls(handle, max_batch=2)  # type: ignore[arg-type]
    joined = await calls.encode("image", np.zeros((5, 1, 1, 3), np.uint8), SNAPSHOT, time.monotonic() + 60)
    assert joined.vectors is not None
    assert joined.vectors[:, 0].tolist() == [0.0, 1.0, 2.0]


async def test_a_search_is_asked_again_when_the_catalog_is_replaced() -> None:
    calls = CatalogCalls(Handle([RuntimeError("replica died")], [{"rows": 1}]), 60.0)  # type: ignore[arg-type]
    assert await calls.status() == {"rows": 1}


async def test_encoders_get_the_time_left_because_their_clocks_may_differ() -> None:
    handle: Any = Handle([EncodeResult(VECTOR, "clip-a", "i", "t")])
    await EncoderCalls(handle, 16).encode("text", [[1]], SNAPSHOT, time.monotonic() + 60)
    assert 0 < handle.asked[0][-1] <= 60


async def test_encoders_are_told_whose_turn_a_request_takes() -> None:
    handle: Any = Handle(*[[EncodeResult(VECTOR, "clip-a", "i", "t")] for _ in range(2)])
    calls = EncoderCalls(handle, max_batch=1)
    await calls.encode("image", np.zeros((2, 1, 1, 3), np.uint8), SNAPSHOT, time.monotonic() + 60, "key:7")
    assert [asked[3] for asked in handle.asked] == ["key:7"] * 2


async def test_a_clock_that_is_set_ends_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    deadline = app_state(None).deadline()
    monkeypatch.setattr("time.time", lambda: 4e9)
    handle: Any = Handle([EncodeResult(VECTOR, "clip-a", "i", "t")])
    result = await EncoderCalls(handle, 16).encode("text", [[1]], SNAPSHOT, deadline)
    assert result.vectors is VECTOR
