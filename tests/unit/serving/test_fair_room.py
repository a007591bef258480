from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import threading
from collections.abc import Callable

import pytest

from serving.http.errors import ApiError
from serving.http.fair_room import LARGE_NICE, SMALL_PIXELS, SMALL_THREADS, DecodeQueue, FairRoom
from serving.messages import MODEL_NICE

LARGE = SMALL_PIXELS + 1


async def entered(room: FairRoom, caller: str, amount: int) -> asyncio.Task[int]:
    task = asyncio.create_task(room.enter(caller, amount))
    await asyncio.sleep(0)
    return task


@pytest.mark.parametrize("amount", [1, 30, 40, 60, 75, 100, 1000])
async def test_a_caller_with_a_flood_leaves_room_for_another_whatever_its_requests_take(amount: int) -> None:
    """Three requests of 32 images, or one picture of 40 million pixels, used to take all of it."""
    room = FairRoom(100, 0.75)
    flood = [await entered(room, "flood", amount) for _ in range(200)]
    assert any(task.done() for task in flood)
    assert (await entered(room, "good", amount)).done()
    for task in flood:
        task.cancel()


async def test_what_a_request_took_is_given_back_and_all_get_in_by_turns() -> None:
    room, inside, values, order = FairRoom(100, 0.6), 0, random.Random(0), []

    async def one(caller: str, amount: int) -> None:
        nonlocal inside
        counted = await room.enter(caller, amount)
        inside += counted
        order.append(caller)
        assert counted <= 60 and inside < 100 + 60
        for _ in range(values.randrange(4)):
            await asyncio.sleep(0)
        inside -= counted
        room.leave(caller, counted)

    tasks = [asyncio.create_task(one(f"caller {n % 5}", values.randint(1, 90))) for n in range(300)]
    for task in tasks[::7]:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert inside == 0 and len(order) == 300 - len(tasks[::7])
    assert len(set(order[:5])) == 5
    assert (await entered(room, "last", 60)).done()


class Gate:
    """Work that waits until it is admitted, and records its order."""

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


async def test_what_waits_is_dropped_when_no_one_waits_for_it_and_a_failure_ends_nothing_else() -> None:
    queue, gate = DecodeQueue(10**9, 1.0), Gate()
    tasks = [asyncio.create_task(queue.run("a", 1, gate.work(str(n)))) for n in range(SMALL_THREADS + 3)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    gate.open.set()
    with pytest.raises(ZeroDivisionError):
        await queue.run("a", 1, lambda: 1 // 0)
    assert await queue.run("a", 1, lambda: "next") == "next"
    assert len(gate.order) <= SMALL_THREADS  # those that ran already


async def test_pixels_that_wait_are_bounded_for_all_and_for_one() -> None:
    queue = DecodeQueue(100, 0.5)
    async with asyncio.TaskGroup() as tasks:
        done = asyncio.Event()
        for caller, pixels in (("a", 1000), ("b", 30)):  # one that is alone is always taken
            tasks.create_task(_hold(queue, caller, pixels, done))
        await asyncio.sleep(0)
        for caller, pixels, whose in (("a", 1, "your images"), ("c", 21, "images")):
            with pytest.raises(ApiError, match=f"^429: {whose} that wait.*serve.max_pixels"):
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
