"""What all requests hold together, and of which one caller holds a share at most: room that is waited for by turns, and
budgets that are taken or refused at once.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from typing import Literal

Refusal = Literal["caller", "all"]


class FairRoom:
    """Used from one event loop. One request more is let in where there is any room left, however much it takes; but
    none of a caller's that goes beyond its share. A request that is larger counts as the share.

    Args:
        size: amount that is inside at once.
        share: of it that one caller has, so that another finds some left.
    """

    def __init__(self, size: float, share: float) -> None:
        self.size, self._share = size, max(1, int(size * share))
        self._used: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[tuple[asyncio.Future[None], int]]] = OrderedDict()

    async def enter(self, caller: str, amount: int) -> int:
        """Wait for room, behind what the caller waits for already. Returns what counts, to be given back."""
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
        """Give room back."""
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
    """Slots, bytes or pixels. Used from one event loop only, so it needs no lock.

    >>> slots = SharedBudget(4, share=0.5)
    >>> [slots.take("a", 1) for _ in range(3)]
    [None, None, 'caller']
    >>> slots.take("b", 3), slots.take("b", 2)
    ('all', None)

    Args:
        size: the amount.
        share: of one caller, so that the others are never left with nothing. It is at least 1.
    """

    def __init__(self, size: int, share: float = 1.0) -> None:
        self.size = size
        self.caller_size = max(1, int(size * share)) if size else 0
        self.used = 0
        self._by_caller: dict[str, int] = {}

    def take(self, caller: str, amount: int) -> Refusal | None:
        """Take an amount, or say which bound is in the way: that of the caller, or that of all."""
        held = self._by_caller.get(caller, 0)
        if self.used + amount > self.size:
            return "all"
        if held + amount > self.caller_size:
            return "caller"
        self.used += amount
        self._by_caller[caller] = held + amount
        return None

    def give_back(self, caller: str, amount: int) -> None:
        """Return what was taken."""
        self.used -= amount
        left = self._by_caller.get(caller, 0) - amount
        if left > 0:
            self._by_caller[caller] = left
        else:
            self._by_caller.pop(caller, None)
