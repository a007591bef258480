"""Which adapters are resident, and who uses them: an adapter goes when its last request has ended, not before."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from core.errors import AdapterError

T = TypeVar("T")


@dataclass(eq=False)
class _Resident(Generic[T]):
    value: T
    users: int = 0
    leaving: bool = False
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class Residents(Generic[T]):
    """``T`` is what an engine needs to answer under an adapter. Used from one event loop."""

    def __init__(self, most: int) -> None:
        """``most``: adapters held at once, those that only finish their last requests included."""
        self._most = most
        self._all: dict[str, _Resident[T]] = {}
        self._changing = asyncio.Lock()

    def names(self) -> frozenset[str]:
        """Those that new requests may use."""
        return frozenset(name for name, one in self._all.items() if not one.leaving)

    async def add(self, name: str, make: Callable[[], Awaitable[T]]) -> None:
        """Hold ``name``, made by ``make`` unless it is there. Raises :class:`AdapterError` when there is no room."""
        async with self._changing:
            there = self._all.get(name)
            if there is not None:
                there.leaving = False
                there.idle.set()
                return
            if len(self._all) >= self._most:
                raise AdapterError(
                    f"There is no room for {name}: {', '.join(sorted(self._all))} are resident or still in use.",
                    "Unload one, wait for its last request, or raise serve.rollback_window.",
                )
            self._all[name] = _Resident(await make())

    async def remove(self, name: str, drop: Callable[[T], Awaitable[None]]) -> None:
        """Take no new request for ``name``, wait for the last one, and ``drop`` it. An unknown name is nothing."""
        resident = self._all.get(name)
        if resident is None or resident.leaving:
            return
        resident.leaving = True
        while resident.users and resident.leaving:
            resident.idle.clear()
            await resident.idle.wait()
        async with self._changing:
            if resident.leaving and not resident.users:  # else it was added again meanwhile
                del self._all[name]
                await drop(resident.value)

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[T]:
        """Keep ``name`` for a request. Raises :class:`AdapterError` when it is not resident."""
        resident = self._all.get(name)
        if resident is None or resident.leaving:
            raise AdapterError(
                f"Adapter {name} is not resident (resident: {', '.join(sorted(self.names())) or 'none'}).",
                "Load it first.",
            )
        resident.users += 1
        try:
            yield resident.value
        finally:
            resident.users -= 1
            if not resident.users:
                resident.idle.set()
