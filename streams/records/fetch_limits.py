"""How many images are fetched at once: from everywhere together, and from each host.

A host that does not answer must not take every seat. Each host has a window of fetches that it may have in flight:
a quarter of all seats at first, doubled by each answer, one after a failure that may pass. A host that has failed for
longer than an image may take is down: one image at a time tries it, at most every :data:`PROBE_SECONDS`; the others are
refused at once, and can be sent again from quarantine.

Here is also which failures may pass, and how long to wait before the next try.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from core.errors import RecordError

PROBE_SECONDS = 5.0
MAX_HOSTS = 1024
"""Hosts that are remembered. Where more are named, those with nothing in flight are forgotten."""


@dataclass(slots=True)
class _Host:
    window: int
    active: int = 0
    waiting: int = 0
    failing_since: float | None = None
    failed_at: float = 0.0
    probe_at: float = 0.0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set, and replaced by a new one, when a waiter may go on."""


class FetchLimits:
    """Seats for fetches. For one event loop.

    Args:
        seats: fetches in flight.
        down_seconds: a host that has only failed for so long is down.
    """

    def __init__(self, seats: int, down_seconds: float) -> None:
        self.seats = seats
        self.down_seconds = down_seconds
        self._all = asyncio.Semaphore(seats)
        self._hosts: dict[str, _Host] = {}

    @asynccontextmanager
    async def seat(self, name: str) -> AsyncIterator[None]:
        """Wait for a seat of host ``name``, and hold it for the block, whose outcome tells how the host is doing.

        Raises:
            RecordError: ``uri_unreachable``, the host is down.
        """
        host = self._host(name)
        await self._enter(name, host)
        try:
            async with self._all:
                yield
            self._answered(host)
        except (TransientFetchError, TimeoutError, asyncio.CancelledError):
            self._failed(host)
            raise
        except RecordError:  # a refusal is an answer, too
            self._answered(host)
            raise
        finally:
            host.active -= 1
            host.changed.set()
            host.changed = asyncio.Event()

    async def _enter(self, name: str, host: _Host) -> None:
        host.waiting += 1
        try:
            while host.active >= host.window and not self._is_down(host):
                await host.changed.wait()
        finally:
            host.waiting -= 1
        if self._is_down(host):
            now = time.monotonic()
            if host.active or now < host.probe_at:
                raise RecordError(
                    "uri_unreachable",
                    f"{name!r} has not answered for {now - (host.failing_since or now):.0f} s.",
                    "Send the record again from quarantine when the host answers.",
                )
            host.probe_at = now + PROBE_SECONDS
        host.active += 1

    def _host(self, name: str) -> _Host:
        if name not in self._hosts and len(self._hosts) >= MAX_HOSTS:
            self._hosts = {key: each for key, each in self._hosts.items() if each.active or each.waiting}
        return self._hosts.setdefault(name, _Host(max(1, self.seats // 4)))

    def _is_down(self, host: _Host) -> bool:
        now = time.monotonic()
        long = host.failing_since is not None and now - host.failing_since > self.down_seconds
        return long and now - host.failed_at <= self.down_seconds  # what failed long ago says nothing about now

    def _answered(self, host: _Host) -> None:
        host.failing_since = None
        host.window = min(self.seats, host.window * 2)

    def _failed(self, host: _Host) -> None:
        now = time.monotonic()
        if host.failing_since is None or now - host.failed_at > self.down_seconds:
            host.failing_since = now
        host.failed_at = now
        host.window = 1


RETRIED_STATUSES = frozenset({408, 425, 429, *range(500, 600)})
"""Answers that another try may change (RFC 9110, RFC 6585, RFC 8470)."""
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 8.0


class TransientFetchError(RecordError):
    """An image could not be fetched now, and perhaps can be later. ``reason`` is ``uri_unreachable``.

    Args:
        message: what happened.
        retry_after: seconds that the server asked to wait.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__("uri_unreachable", message, "Check the address, or send the image itself.")
        self.retry_after = retry_after


def pause_before(retry: int, retry_after: float | None = None) -> float:
    """Seconds before try ``retry`` (1 for the first repetition).

    Exponential, with half of it random, so that images that failed together do not come back together; at least what
    the server asked for.
    """
    longest = min(FIRST_PAUSE_SECONDS * 2.0 ** (retry - 1), LONGEST_PAUSE_SECONDS)
    pause = longest * random.uniform(0.5, 1.0)  # noqa: S311
    return max(pause, retry_after or 0.0)


def parse_retry_after(text: str, now: datetime | None = None) -> float | None:
    """Seconds of a ``Retry-After`` header (a number or an HTTP date); None where it is neither."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        then = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    aware = then.replace(tzinfo=UTC) if then.tzinfo is None else then
    return max(0.0, (aware - (now or datetime.now(UTC))).total_seconds())
