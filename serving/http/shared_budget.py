"""An amount that all requests hold together, and of which one caller holds a share at most."""

from __future__ import annotations

from typing import Literal

Refusal = Literal["caller", "all"]


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
