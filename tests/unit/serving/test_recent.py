"""What a store says, while it answers, is slow, silent and away."""

from __future__ import annotations

import asyncio
import threading

import pytest

from ops.errors import LedgerUnavailable
from serving.http import recent
from serving.http.recent import LastKnown


class Store:
    """Counts readings, and those at once; waits while ``go`` is not set."""

    def __init__(self) -> None:
        self.count = 0
        self.at_once = 0
        self.most = 0
        self.away = False
        self.go = threading.Event()
        self.go.set()

    def read(self) -> int:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            assert self.go.wait(60)
            if self.away:
                raise LedgerUnavailable("away.")
            self.count += 1
            return self.count
        finally:
            self.at_once -= 1


async def test_each_caller_has_what_was_there_when_he_came_and_they_share_readings() -> None:
    store = Store()
    values = LastKnown(store.read, "test")
    assert [await values.get(), await values.get()] == [1, 2]
    store.go.clear()
    callers = [asyncio.create_task(values.get()) for _ in range(20)]
    await asyncio.sleep(0)
    late = [asyncio.create_task(values.get()) for _ in range(20)]
    store.go.set()
    assert set(await asyncio.gather(*callers)) <= {3, 4}
    assert min(await asyncio.gather(*late)) >= 3
    assert (store.count <= 5, store.most) == (True, 1)


async def test_while_the_store_is_silent_the_last_value_is_told_and_no_second_reading_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = Store()
    values = LastKnown(store.read, "test")
    assert await values.get() == 1
    monkeypatch.setattr(recent, "READ_SECONDS", 0.05)
    store.go.clear()
    try:
        assert await asyncio.gather(*(values.get() for _ in range(50))) == [1] * 50
        assert (store.at_once, store.most) == (1, 1)
    finally:
        store.go.set()


async def test_while_the_store_is_away_the_last_value_is_told_and_without_one_why() -> None:
    store = Store()
    values = LastKnown(store.read, "test")
    store.away = True
    with pytest.raises(LedgerUnavailable):
        await values.get()
    store.away = False
    assert await values.get() == 1
    store.away = True
    assert await values.get() == 1
