"""Room for the work of several callers."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from serving.http.fair_room import FairRoom


async def entered(room: FairRoom, caller: str, amount: int) -> asyncio.Task[int]:
    task = asyncio.create_task(room.enter(caller, amount))
    await asyncio.sleep(0)
    return task


@pytest.mark.parametrize("amount", [1, 30, 40, 60, 75, 100, 1000])
async def test_a_caller_with_a_flood_leaves_room_for_another_whatever_its_requests_take(amount: int) -> None:
    """Three requests of 32 images, or one picture of 40 million pixels, had taken all of it."""
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
