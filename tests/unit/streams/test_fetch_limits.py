"""A host that fails gets fewer seats, and one that is down gets none but to be tried."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from core.errors import RecordError
from streams.records import uris
from streams.records.fetching import TransientFetchError, parse_retry_after
from streams.records.uris import PROBE_SECONDS, FetchLimits, pause_before

HOST = "cdn.test:80"


class Clock:
    """A clock that is set by hand."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(uris, "time", made)
    return made


async def use(limits: FetchLimits, outcome: Exception | None = None, host: str = HOST) -> None:
    async with limits.seat(host):
        if outcome is not None:
            raise outcome


async def fail(limits: FetchLimits, host: str = HOST) -> None:
    with pytest.raises(TransientFetchError):
        await use(limits, TransientFetchError("down"), host)


async def test_the_window_of_a_host_grows_with_answers_and_is_one_after_a_failure() -> None:
    limits = FetchLimits(16, 30.0)
    assert await most_at_once(limits) == 4
    assert await most_at_once(limits) == 16, "all of the 40 were answered"
    await fail(limits)
    assert await most_at_once(limits, 1) == 1
    with pytest.raises(RecordError):  # "404" is an answer
        await use(limits, RecordError("uri_unreachable", "answers 404."))
    assert await most_at_once(limits) == 4


async def most_at_once(limits: FetchLimits, fetches: int = 40) -> int:
    """Seats that the host gets at once; then all of the fetches are answered."""
    inside, leave = 0, asyncio.Event()

    async def hold() -> None:
        nonlocal inside
        async with limits.seat(HOST):
            inside += 1
            await leave.wait()

    tasks = [asyncio.create_task(hold()) for _ in range(fetches)]
    await asyncio.sleep(0)  # each runs until it waits
    first = inside
    leave.set()
    await asyncio.gather(*tasks)
    return first


async def test_a_host_that_is_down_is_tried_by_one_at_a_time_and_refused_to_others(clock: Clock) -> None:
    limits = FetchLimits(8, 30.0)
    await fail(limits)
    clock.now += 20
    await fail(limits)  # within the time of one image: it may come back
    clock.now += 11
    await fail(limits)  # the probe
    with pytest.raises(RecordError, match="has not answered for 31 s"):
        await use(limits)
    await use(limits, host="other.test:80")
    clock.now += PROBE_SECONDS
    await use(limits)  # the next probe is answered
    await use(limits)


def test_pauses_grow_are_spread_and_are_at_least_what_the_server_asks() -> None:
    pauses = {retry: [pause_before(retry) for _ in range(50)] for retry in (1, 3, 9)}
    assert all(0.125 <= each <= 0.25 for each in pauses[1])
    assert all(0.5 <= each <= 1.0 for each in pauses[3])
    assert all(4.0 <= each <= 8.0 for each in pauses[9])
    assert len(set(pauses[1])) > 10
    assert pause_before(1, 7.0) == 7.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0.0), (" 120 ", 120.0), ("Thu, 01 Jan 2026 00:00:30 GMT", 30.0), ("Wed, 31 Dec 2025 23:00:00 GMT", 0.0),
     ("", None), ("soon", None), ("-5", None), ("1.5", None), ("²", None), ("9" * 400, 999999999.0)],
)  # fmt: skip
def test_retry_after_is_a_number_or_a_date(text: str, seconds: float | None) -> None:
    assert parse_retry_after(text, datetime(2026, 1, 1, tzinfo=UTC)) == seconds
