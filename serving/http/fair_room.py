"""Room and budgets that requests share, limiting each caller to a share: :class:`FairRoom` is waited for by turns,
:class:`SharedBudget` is taken or refused at once, and :class:`DecodeQueue` runs work on images within both."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

from core.priority import nice_thread
from serving.http.errors import ApiError
from serving.messages import MODEL_NICE

Refusal = Literal["caller", "all"]
Result = TypeVar("Result")
SMALL_PIXELS = 1_000_000
"""Larger images go to the thread for large ones: a million pixels take 25 ms, the longest that others wait."""
ROOM = 0.25
"""Share of the pixels of all waiting images that may be in memory at once."""
SMALL_THREADS = 2
LARGE_THREADS = 1
LARGE_NICE = 10
"""On Linux, the thread for large images gets about a tenth of a contended core."""


class FairRoom:
    """Room of ``size`` that callers enter by turns, each up to its ``share``; larger requests count as the share. While
    any room is left one more request is admitted, however large. Use from one event loop."""

    def __init__(self, size: float, share: float) -> None:
        self.size, self._share = size, max(1, int(size * share))
        self._used: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[tuple[asyncio.Future[None], int]]] = OrderedDict()

    async def enter(self, caller: str, amount: int) -> int:
        """Wait for room behind the caller's other requests. Returns the amount to give back."""
        amount = min(amount, self._share)
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append((admitted, amount))
        self._admit()
        try:
            await admitted
        except asyncio.CancelledError:
            if admitted.done() and not admitted.cancelled():
                self.leave(caller, amount)
            raise
        return amount

    def leave(self, caller: str, amount: int) -> None:
        self._used[caller] -= amount
        if self._used[caller] <= 0:
            del self._used[caller]
        self._admit()

    def _admit(self) -> None:
        full: OrderedDict[str, deque[tuple[asyncio.Future[None], int]]] = OrderedDict()
        while self._waiting and self._used.total() < self.size:
            caller, queue = self._waiting.popitem(last=False)
            admitted, amount = queue[0]
            if self._used[caller] + amount > self._share and not admitted.done():
                full[caller] = queue
                continue
            queue.popleft()
            if queue:
                self._waiting[caller] = queue  # behind the others
            if not admitted.done():  # its request was cancelled
                self._used[caller] += amount
                admitted.set_result(None)
        self._waiting = full | self._waiting


class SharedBudget:
    """Slots, bytes or pixels. Use from one event loop. ``share``: of ``size`` for one caller, so that others always
    find some; at least 1."""

    def __init__(self, size: int, share: float = 1.0) -> None:
        self.size = size
        self.caller_size = max(1, int(size * share)) if size else 0
        self.used = 0
        self._by_caller: Counter[str] = Counter()

    def take(self, caller: str, amount: int) -> Refusal | None:
        """Take an amount, or return the limit that prevents it: the caller's, or that of all."""
        if self.used + amount > self.size:
            return "all"
        if self._by_caller[caller] + amount > self.caller_size:
            return "caller"
        self.used += amount
        self._by_caller[caller] += amount
        return None

    def give_back(self, caller: str, amount: int) -> None:
        self.used -= amount
        self._by_caller[caller] -= amount
        if self._by_caller[caller] <= 0:
            del self._by_caller[caller]


class DecodeQueue:
    """Runs work on images in threads, by turns of the callers, each with a ``share`` of the reserved ``pixels``. Use
    from one event loop. Small images have threads of their own with the models' priority: next to two of a higher one,
    a batch of images took 1.0 s instead of 0.14 s. Large ones are decoded one at a time at a lower priority: 40 million
    pixels take about a second and several hundred megabytes. Requests without room wait as encoded bytes."""

    def __init__(self, pixels: int, share: float) -> None:
        self._budget = SharedBudget(pixels, share)
        self._room = FairRoom(pixels * ROOM, share)
        self._small = _FairPool(SMALL_THREADS, "image-loader", MODEL_NICE)
        self._large = _FairPool(LARGE_THREADS, "large-images", LARGE_NICE)

    @property
    def pixels(self) -> int:
        return self._budget.used

    @contextlib.asynccontextmanager
    async def reserved(self, caller: str, pixels: int) -> AsyncIterator[Callable[[int], None]]:
        """Wait for room for the images of one request, and reserve it until the block ends. Yields a function to call
        with the pixels that stay in memory after decoding and scaling. Raises ApiError (429) when too many pixels wait
        already."""
        held = min(pixels, self._budget.caller_size)  # a single request is always accepted
        if refusal := self._budget.take(caller, held):
            whose = "your images" if refusal == "caller" else "images"
            raise ApiError(
                429, f"{whose} that wait to be decoded or answered have too many pixels (four times "
                "serve.max_pixels); send the request again later.", code="overloaded",
            )  # fmt: skip

        inside = 0

        def keep(pixels: int) -> None:
            nonlocal held, inside
            freed, left = max(0, held - pixels), min(inside, pixels)
            self._budget.give_back(caller, freed)
            self._room.leave(caller, inside - left)
            held, inside = held - freed, left

        try:
            inside = await self._room.enter(caller, held)
            try:
                yield keep
            finally:
                self._room.leave(caller, inside)
        finally:
            self._budget.give_back(caller, held)

    async def run(self, caller: str, pixels: int, work: Callable[[], Result]) -> Result:
        """Run work on an image of this size when it is the caller's turn. Cancelling drops work that still waits."""
        return await (self._small if pixels <= SMALL_PIXELS else self._large).run(caller, work)


class _FairPool:
    """Threads that take the next job of each caller in turn."""

    def __init__(self, threads: int, name: str, nice: int) -> None:
        self._room = FairRoom(threads, 1.0)
        self._threads = ThreadPoolExecutor(threads, name, initializer=nice_thread, initargs=(nice,))

    async def run(self, caller: str, work: Callable[[], Result]) -> Result:
        """The result of ``work``. Cancelling does not stop running work, which keeps its thread."""
        inside = await self._room.enter(caller, 1)
        job = asyncio.get_running_loop().run_in_executor(self._threads, work)
        job.add_done_callback(lambda _: self._room.leave(caller, inside))
        return await asyncio.shield(job)
