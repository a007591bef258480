"""The newest releases, while the ledger answers, is slow, silent and away."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from core.errors import LedgerUnavailable
from serving.http import operations
from serving.http.operations import LastReleases


class Ledger:
    """Has one release more at each reading. Waits while ``go`` is not set."""

    def __init__(self) -> None:
        self.newest = 0
        self.inside = 0
        self.away = False
        self.go = threading.Event()
        self.go.set()

    def read(self, limit: int) -> list[Any]:
        self.inside += 1
        assert self.go.wait(60)
        self.inside -= 1
        if self.away:
            raise LedgerUnavailable("away.")
        self.newest += 1
        return [SimpleNamespace(number=number) for number in range(self.newest, 0, -1)][:limit]


async def numbers(releases: LastReleases, limit: int = 1) -> list[int]:
    return [row.number for row in await releases.get(limit)]


async def test_each_caller_has_what_was_there_when_he_came() -> None:
    releases = LastReleases(Ledger().read)
    assert [await numbers(releases), await numbers(releases, 2)] == [[1], [2, 1]]


async def test_while_the_ledger_is_silent_the_last_ones_are_told_and_no_second_reading_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ledger = Ledger()
    releases = LastReleases(ledger.read)
    assert [await numbers(releases), await numbers(releases)] == [[1], [2]]
    monkeypatch.setattr(operations, "READ_SECONDS", 0.05)
    ledger.go.clear()
    try:
        assert await asyncio.gather(*(numbers(releases, 5) for _ in range(50))) == [[2, 1]] * 50
        assert ledger.inside == 1
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
