"""A queue of requests for an engine, in fair batches of one kind (images or texts) and one adapter: in an encoder for
its forward passes, and in the ingress for its calls to encoders.

Each group (kind and adapter) has its own queue, and groups take turns batch by batch: a request waits for at most one
batch of every other group, and a single group has the whole engine. Within a group, a batch takes one request of each
caller in turn, in order of arrival for each caller.

While several callers ask, each gets at most 30 ms of a batch, and larger requests are split: 16 images take 140 ms on a
CPU, for which a caller with a single image would wait behind another's batch and again in a shared one.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field, replace

from core.request_context import detached
from core.tracing import record
from serving.messages import EncodeRequest, EncodeResult, Modality, joined

Group = tuple[Modality, str | None]
TURN_SECONDS = 0.03
"""Of a batch, while several callers ask."""
ASKS_SECONDS = 2.0
"""A caller counts as asking for this long after its last request arrived or was (partly) encoded."""


@dataclass(slots=True)
class _Waiting:
    request: EncodeRequest
    result: asyncio.Future[EncodeResult]
    since: float
    context: Context
    """Of the request; that of the first one in a batch is the batch's, so that its trace continues."""
    parts: list[EncodeResult] = field(default_factory=list)
    began: float = 0.0
    """Time when its first batch began; 0: in none yet."""
    together: int = 0
    """Number of requests in its batch."""


class FairBatches:
    """Runs batches, by default one at a time. Use from one event loop."""

    def __init__(
        self, run: Callable[[Sequence[EncodeRequest]], Awaitable[Sequence[EncodeResult]]], max_cost: int,
        turn_seconds: float = TURN_SECONDS, at_once: int = 1, whole: int = 0, patience: float | None = None,
    ) -> None:  # fmt: skip
        """``run`` encodes a batch, and returns a result for each request or raises for all. ``max_cost``: of a batch; a
        request that costs more runs alone. ``turn_seconds``: longest batch while several callers ask, unless one item
        takes longer; infinite: nothing is split. ``at_once``: batches that run together, and ``whole``: further ones
        that do if nothing more fits into them; others fill meanwhile. A batch that takes longer than ``patience`` does
        not count: an engine that hangs must not hold up others."""
        self._run = run
        self._max_cost = max_cost
        self._turn_seconds = turn_seconds
        first = 1.0 if math.isfinite(turn_seconds) else max_cost
        self.turns: dict[Modality, float] = {"image": first, "text": first}
        """The cost that takes one turn, learned from the last batches; starts at one item."""
        self._groups: OrderedDict[Group, OrderedDict[str, deque[_Waiting]]] = OrderedDict()
        """Waiting requests by caller, never empty; the first group is next."""
        self._asked: dict[str, float] = {}
        """Time when each caller last asked or had its turn, in this order."""
        self._cost = 0
        self._changed = asyncio.Event()
        """Set when a request comes, and when a batch ends or no longer counts."""
        self._task: asyncio.Task[None] | None = None
        self._at_once, self._whole, self._patience = at_once, whole, patience
        self._counted = 0
        self._running: set[asyncio.Task[None]] = set()

    async def submit(self, request: EncodeRequest) -> EncodeResult:
        """The result of one request. Raises what running its batch raised. If cancelled before its turn, or past its
        deadline (``late``), it is not computed."""
        result: asyncio.Future[EncodeResult] = asyncio.get_running_loop().create_future()
        callers = self._groups.setdefault((request.kind, request.adapter), OrderedDict())
        waiting = _Waiting(request, result, time.monotonic(), copy_context())
        callers.setdefault(request.caller, deque()).append(waiting)
        self._note(request.caller)
        self._cost += request.cost
        self._changed.set()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._work(), context=detached())
        value = await result
        _record(waiting)
        return value

    async def _work(self) -> None:
        while self._groups:
            await self._wait_for_room()
            if batch := self._take():
                self._counted += 1
                running = asyncio.get_running_loop().create_task(self._run_batch(batch), context=batch[0][0].context)
                for task in (running, asyncio.get_running_loop().create_task(self._count(running))):
                    self._running.add(task)
                    task.add_done_callback(self._running.discard)

    async def _wait_for_room(self) -> None:
        while self._counted >= self._at_once + (self._whole if self._cost >= self._max_cost else 0):
            self._changed.clear()
            await self._changed.wait()

    async def _count(self, running: asyncio.Task[None]) -> None:
        await asyncio.wait([running], timeout=self._patience)
        self._counted -= 1
        self._changed.set()

    def _take(self) -> list[tuple[_Waiting, EncodeRequest]]:
        """The next batch, with the part of each request that it encodes; empty when no one waits for what was taken."""
        group, callers = self._groups.popitem(last=False)
        turn = self.turns[group[0]] if self._several_ask(callers) else math.inf
        batch: list[tuple[_Waiting, EncodeRequest]] = []
        behind: OrderedDict[str, deque[_Waiting]] = OrderedDict()
        costs: Counter[str] = Counter()
        while callers:
            caller, queue = callers.popitem(last=False)
            waiting = queue[0]
            if waiting.result.done() or time.monotonic() > waiting.request.deadline:
                if not waiting.result.done():  # else its client went away, or an earlier part failed
                    waiting.result.set_result(late(waiting.request))
                taken = waiting.request
            else:
                taken = waiting.request.beginning(turn - costs[caller])
                if batch and (costs[caller] >= turn or costs.total() + taken.cost > self._max_cost):
                    behind[caller] = queue
                    continue
                batch.append((waiting, taken))
                costs[caller] += taken.cost
                self._note(caller)
            self._cost -= taken.cost
            waiting.request = replace(waiting.request, payload=waiting.request.payload[len(taken.payload) :])
            if not len(waiting.request.payload):
                queue.popleft()
            if queue:
                callers[caller] = queue
        if behind:
            self._groups[group] = behind
        return batch

    def _note(self, caller: str) -> None:
        if caller:  # else the server's own
            self._asked.pop(caller, None)
            self._asked[caller] = time.monotonic()

    def _several_ask(self, waiting: Iterable[str]) -> bool:
        while self._asked and time.monotonic() - (first := next(iter(self._asked.items())))[1] > ASKS_SECONDS:
            del self._asked[first[0]]
        return len({*self._asked, *filter(None, waiting)}) > 1

    async def _run_batch(self, batch: list[tuple[_Waiting, EncodeRequest]]) -> None:
        began = time.monotonic()
        for waiting, _ in batch:
            waiting.began, waiting.together = waiting.began or began, len(batch)
        try:
            parts = [part for _, part in batch]
            results = await self._run(parts)
            self._adapt(parts, time.monotonic() - began)
            for (waiting, _), result in zip(batch, results, strict=True):
                waiting.parts.append(result)
            for waiting, _ in batch:  # may hold two parts of one request
                failed = any(part.code for part in waiting.parts)
                if not waiting.result.done() and (failed or not len(waiting.request.payload)):
                    waiting.result.set_result(joined(waiting.parts))
        except Exception as error:
            for waiting, _ in batch:
                if not waiting.result.done():
                    waiting.result.set_exception(error)

    def _adapt(self, batch: Sequence[EncodeRequest], took: float) -> None:
        """Shrink turns after a batch that took too long; grow them after one in which a caller used its whole turn."""
        if len(self._asked) < 2:
            return
        costs: Counter[str] = Counter()
        for part in batch:
            costs[part.caller] += part.cost
        turn = self.turns[batch[0].kind]
        if took > self._turn_seconds or max(costs.values()) >= turn:
            factor = min(2.0, max(0.5, self._turn_seconds / max(took, 1e-6)))
            self.turns[batch[0].kind] = min(self._max_cost, max(1.0, turn * factor))


def _record(waiting: _Waiting) -> None:
    """Record spans afterwards, because a request's batch is not known before."""
    now = time.monotonic()
    record("queue", waiting.since, waiting.began or now)
    if waiting.began:
        record("forward", waiting.began, now, requests=waiting.together)


def late(request: EncodeRequest) -> EncodeResult:
    return EncodeResult(None, request.adapter, code="late", error="the deadline passed in the queue")
