"""The newest releases, while the ledger answers, is slow, silent and away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from core.errors import LedgerUnavailable
from serving.http import recent
from serving.http.recent import LastReleases


class Ledger:
    """Has one release more at each reading; remembers how many were read. Waits while ``go`` is not set."""

    def __init__(self) -> None:
        self.newest = 0
        self.sizes: list[int] = []
        self.at_once = 0
        self.most = 0
        self.away = False
        self.go = threading.Event()
        self.go.set()

    def read(self, limit: int) -> list[Any]:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            assert self.go.wait(60)
            if self.away:
                raise LedgerUnavailable("away.")
            self.newest += 1
            self.sizes.append(limit)
            return [SimpleNamespace(number=number) for number in range(self.newest, 0, -1)][:limit]
        finally:
            self.at_once -= 1


async def numbers(releases: LastReleases, limit: int = 1) -> list[int]:
    return [row.number for row in await releases.get(limit)]


async def test_each_caller_has_what_was_there_when_he_came_and_they_share_readings() -> None:
    ledger = Ledger()
    releases = LastReleases(ledger.read)
    assert [await numbers(releases), await numbers(releases)] == [[1], [2]]
    ledger.go.clear()
    callers = [asyncio.create_task(numbers(releases)) for _ in range(20)]
    await asyncio.sleep(0)
    late = [asyncio.create_task(numbers(releases)) for _ in range(20)]
    ledger.go.set()
    assert {number for (number,) in await asyncio.gather(*callers)} <= {3, 4}
    assert min(await asyncio.gather(*late)) >= [3]
    assert (ledger.newest <= 5, ledger.most) == (True, 1)


async def test_no_more_is_read_than_those_who_wait_ask_for() -> None:
    ledger = Ledger()
    ledger.newest = 99
    releases = LastReleases(ledger.read)
    assert await numbers(releases, 2) == [100, 99]
    ledger.go.clear()
    first = asyncio.create_task(numbers(releases, 1))
    await asyncio.sleep(0)
    others = [asyncio.create_task(numbers(releases, limit)) for limit in (3, 5, 4)]
    await asyncio.sleep(0)
    ledger.go.set()
    await first
    assert [len(found) for found in await asyncio.gather(*others)] == [3, 5, 4]
    assert ledger.sizes == [2, 1, 5]


@pytest.mark.parametrize(
    ("newest", "limit", "known"), [(5, 1, [5, 4, 3, 2]), (6, 2, [6, 5, 4, 3, 2]), (6, 1, [6]), (9, 20, range(9, 0, -1))]
)
async def test_what_was_read_before_is_told_where_nothing_is_missing_between(
    newest: int, limit: int, known: Sequence[int]
) -> None:
    ledger = Ledger()
    ledger.newest = 3
    releases = LastReleases(ledger.read)
    assert await numbers(releases, 3) == [4, 3, 2]
    ledger.newest = newest - 1
    await numbers(releases, limit)
    ledger.away = True
    assert await numbers(releases, 10) == [*known]


async def test_while_the_ledger_is_silent_the_last_ones_are_told_and_no_second_reading_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ledger = Ledger()
    releases = LastReleases(ledger.read)
    assert await numbers(releases) == [1]
    monkeypatch.setattr(recent, "READ_SECONDS", 0.05)
    ledger.go.clear()
    try:
        assert await asyncio.gather(*(numbers(releases) for _ in range(50))) == [[1]] * 50
        assert (ledger.at_once, ledger.most) == (1, 1)
    finally:
        ledger.go.set()


async def test_while_the_ledger_is_away_the_last_ones_are_told_and_without_one_why() -> None:
    ledger = Ledger()
    releases = LastReleases(ledger.read)
    ledger.away = True
    with pytest.raises(LedgerUnavailable):
        await numbers(releases)
    ledger.away = False
    assert await numbers(releases) == [1]
    ledger.away = True
    assert await numbers(releases) == [1]
