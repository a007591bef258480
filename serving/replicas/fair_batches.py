"""Requests that wait for the engine, in batches of one model version each that take turns.

A batch runs under one adapter, and encodes images or texts. In one queue for all of them a canary would halve every
batch, and a client that floods one adapter would let all others wait behind it. Here each group of requests (kind and
adapter) has a queue of its own; the groups take turns, a batch each, so that a request waits for one batch of every
other group at most, and a group alone has the whole engine. Within a group a batch is filled with one request of each
caller in turn, so that a caller with many requests waiting delays another's by one batch. A request that does not fit
any more is the first of the next batch; those of one caller run in the order of arrival.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from ops.request_context import detached
from ops.tracing import record
from serving.messages import EncodeRequest, EncodeResult, Modality

Group = tuple[Modality, str | None]


@dataclass(slots=True)
class _Waiting:
    request: EncodeRequest
    result: asyncio.Future[EncodeResult]
    since: float
    began: float = 0.0
    """When its batch began; 0: it was in none."""
    together: int = 0
    """Requests of its batch."""


class FairBatches:
    """Runs one batch at a time. Use from one event loop."""

    def __init__(
        self, run: Callable[[Sequence[EncodeRequest]], Awaitable[Sequence[EncodeResult]]], max_cost: int,
        wait_seconds: float,
    ) -> None:  # fmt: skip
        """Args:
        run: encodes a batch; returns a result for each request, or raises for all of them.
        max_cost: of a batch, see :attr:`EncodeRequest.cost`; a request that costs more runs alone.
        wait_seconds: how long a request waits for a batch to fill, where the last batch had several requests: their
            clients may all be about to ask again. One that asks alone does not wait.
        """
        self._run = run
        self._max_cost = max_cost
        self._wait_seconds = wait_seconds
        self._groups: OrderedDict[Group, OrderedDict[str, deque[_Waiting]]] = OrderedDict()
        """What each caller waits for. None is empty; the next turn is the first one's."""
        self._cost = 0
        self._last = 0
        """Requests of the last batch."""
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def submit(self, request: EncodeRequest) -> EncodeResult:
        """The result of one request. Cancelled before its turn, and past its deadline (``late``), it costs no compute.

        Raises what running its batch raised.
        """
        result: asyncio.Future[EncodeResult] = asyncio.get_running_loop().create_future()
        callers = self._groups.setdefault((request.kind, request.adapter), OrderedDict())
        waiting = _Waiting(request, result, time.monotonic())
        callers.setdefault(request.caller, deque()).append(waiting)
        self._cost += request.cost
        self._arrived.set()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._work(), context=detached())
        value = await result
        _record(waiting)
        return value

    async def _work(self) -> None:
        while self._groups:
            await self._fill()
            if batch := self._take():
                await self._run_batch(batch)

    async def _fill(self) -> None:
        """Wait until there is work for a whole batch, or the request whose turn it is has waited long enough."""
        if self._last <= 1:
            return
        callers = next(iter(self._groups.values()))
        end = next(iter(callers.values()))[0].since + self._wait_seconds
        while self._cost < self._max_cost and (left := end - time.monotonic()) > 0:
            self._arrived.clear()
            try:
                async with asyncio.timeout(left):
                    await self._arrived.wait()
            except TimeoutError:
                return

    def _take(self) -> list[_Waiting]:
        """The next batch; empty when nobody waits for what was taken."""
        group, callers = self._groups.popitem(last=False)
        batch: list[_Waiting] = []
        behind: OrderedDict[str, deque[_Waiting]] = OrderedDict()
        cost = 0
        while callers:
            caller, queue = callers.popitem(last=False)
            waiting = queue[0]
            if batch and cost + waiting.request.cost > self._max_cost:
                behind[caller] = queue
                continue
            queue.popleft()
            self._cost -= waiting.request.cost
            if queue:
                callers[caller] = queue
            if waiting.result.done():  # the client went away
                continue
            if time.monotonic() > waiting.request.deadline:
                waiting.result.set_result(late(waiting.request))
                continue
            batch.append(waiting)
            cost += waiting.request.cost
        if behind:
            self._groups[group] = behind
        return batch

    async def _run_batch(self, batch: list[_Waiting]) -> None:
        self._last, began = len(batch), time.monotonic()
        for waiting in batch:
            waiting.began, waiting.together = began, len(batch)
        try:
            results = await self._run([waiting.request for waiting in batch])
            for waiting, result in zip(batch, results, strict=True):
                if not waiting.result.done():
                    waiting.result.set_result(result)
        except Exception as error:
            for waiting in batch:
                if not waiting.result.done():
                    waiting.result.set_exception(error)


def _record(waiting: _Waiting) -> None:
    """Spans of what is over: which batch a request is in was not known before."""
    now = time.monotonic()
    record("queue", waiting.since, waiting.began or now)
    if waiting.began:
        record("forward", waiting.began, now, requests=waiting.together)


def late(request: EncodeRequest) -> EncodeResult:
    """The answer to a request whose deadline has passed."""
    return EncodeResult(None, request.adapter, code="late", error="the deadline passed in the queue")
