"""Images are decoded in turns of their callers, within a number of pixels."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable

import pytest

from serving.http.errors import ApiError
from serving.http.fair_room import LARGE_NICE, SMALL_PIXELS, SMALL_THREADS, DecodeQueue
from serving.messages import MODEL_NICE

LARGE = SMALL_PIXELS + 1


class Gate:
    """Work that waits until it is let through, and remembers its order."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.order: list[str] = []

    def work(self, name: str) -> Callable[[], str]:
        def run() -> str:
            assert self.open.wait(30)
            self.order.append(name)
            return name

        return run


async def test_callers_take_turns_whatever_one_of_them_has_waiting() -> None:
    queue, gate = DecodeQueue(10**9, 1.0), Gate()
    bombs = [asyncio.create_task(queue.run("a", LARGE, gate.work(f"a{n}"))) for n in range(10)]
    await asyncio.sleep(0)
    good = asyncio.create_task(queue.run("b", LARGE, gate.work("b")))
    await asyncio.sleep(0)
    gate.open.set()
    assert await good == "b"
    await asyncio.gather(*bombs)
    assert gate.order[:3] == ["a0", "a1", "b"]


async def test_small_images_do_not_wait_for_large_ones() -> None:
    queue, gate = DecodeQueue(10**9, 1.0), Gate()
    bombs = [asyncio.create_task(queue.run("a", LARGE, gate.work("a"))) for _ in range(32)]
    await asyncio.sleep(0)
    assert await queue.run("a", SMALL_PIXELS, lambda: "small") == "small"
    gate.open.set()
    await asyncio.gather(*bombs)


async def test_only_one_large_image_is_decoded_at_once() -> None:
    queue, running, most = DecodeQueue(10**9, 1.0), 0, 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.002)
        with lock:
            running -= 1

    await asyncio.gather(*(queue.run(f"caller {n}", LARGE, work) for n in range(8)))
    assert most == 1


async def test_what_waits_is_dropped_when_nobody_waits_for_it() -> None:
    queue, gate = DecodeQueue(10**9, 1.0), Gate()
    tasks = [asyncio.create_task(queue.run("a", 1, gate.work(str(n)))) for n in range(SMALL_THREADS + 3)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    gate.open.set()
    assert await queue.run("a", 1, lambda: "next") == "next"
    assert len(gate.order) <= SMALL_THREADS  # those that ran already


async def test_a_failure_is_raised_where_it_is_awaited_and_ends_nothing_else() -> None:
    queue = DecodeQueue(10**9, 1.0)

    def fail() -> None:
        raise ValueError("no image")

    with pytest.raises(ValueError, match="no image"):
        await queue.run("a", 1, fail)
    assert await queue.run("a", 1, lambda: 7) == 7


async def test_pixels_that_wait_are_bounded_for_all_and_for_one() -> None:
    queue = DecodeQueue(100, 0.5)
    async with asyncio.TaskGroup() as tasks:
        done = asyncio.Event()
        for caller, pixels in (("a", 1000), ("b", 30)):  # one that is alone is always taken
            tasks.create_task(_hold(queue, caller, pixels, done))
        await asyncio.sleep(0)
        for caller, pixels, whose in (("a", 1, "your images"), ("c", 21, "images")):
            with pytest.raises(ApiError, match=f"^429: {whose} that wait.*serve.decode_pixels"):
                await _hold(queue, caller, pixels, done)
        done.set()
    assert queue.pixels == 0


async def _hold(
    queue: DecodeQueue, caller: str, pixels: int, done: asyncio.Event, held: list[str] | None = None
) -> None:
    async with queue.reserved(caller, pixels):
        held = [] if held is None else held
        held.append(caller)
        try:
            await done.wait()
        finally:
            held.remove(caller)


async def test_a_request_that_is_scaled_down_makes_room_for_the_next() -> None:
    queue, done, held = DecodeQueue(400, 1.0), asyncio.Event(), list[str]()
    async with queue.reserved("a", 100) as keep:
        next_one = asyncio.create_task(_hold(queue, "b", 100, done, held))
        await asyncio.sleep(0.01)
        assert not held
        keep(10)
        await asyncio.sleep(0.01)
        assert held == ["b"]
    done.set()
    await next_one
    assert queue.pixels == 0


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own elsewhere")
async def test_images_are_decoded_at_the_priority_of_the_models_and_large_ones_at_a_lower_one() -> None:
    queue = DecodeQueue(10**9, 1.0)

    def nice() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    mine = nice()
    assert await queue.run("a", 1, nice) == max(mine, MODEL_NICE)
    assert await queue.run("a", LARGE, nice) == min(19, max(mine, LARGE_NICE))
