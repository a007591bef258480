"""Requests that wait for encoders, simulated event by event: how long they take at a load.

Each encoder takes what waits, up to a batch, as soon as it is free, as the server's batching does. Requests have one
input. What a request costs outside of the encoders is part of the times where both share a machine.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ops.planning.service_times import ServiceTimes

REQUESTS = 20_000


@dataclass(frozen=True)
class Outcome:
    """Of one simulated load; times in seconds."""

    requests_per_second: float
    p50: float
    p99: float
    busy: float
    """Share of the encoders' time."""


def open_loop(
    times: ServiceTimes, rate: float, encoders: int, max_batch: int, requests: int = REQUESTS, seed: int = 0
) -> Outcome:
    """Requests that come independently of each other (Poisson), so many a second."""
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, requests)).tolist()
    taken = 0
    free = [0.0] * encoders
    waits: list[float] = []
    busy = 0.0
    while taken < requests:
        start = max(heapq.heappop(free), arrivals[taken])
        end = taken
        while end < min(requests, taken + max_batch) and arrivals[end] <= start:
            end += 1
        seconds = times.batch(end - taken, end - taken)
        waits += [start + seconds - came for came in arrivals[taken:end]]
        busy += seconds
        heapq.heappush(free, start + seconds)
        taken = end
    last = max(free)
    return _outcome(waits, last, busy / (last * encoders))


def closed_loop(times: ServiceTimes, clients: int, encoders: int, max_batch: int, requests: int = REQUESTS) -> Outcome:
    """Clients that each send the next request when they have their answer."""
    waiting = [0.0] * clients
    free = [0.0] * encoders
    returning: list[tuple[float, int]] = []
    waits: list[float] = []
    busy = 0.0
    now = 0.0
    while len(waits) < requests:
        now = max(now, heapq.heappop(free))
        if not waiting and returning:
            now = max(now, returning[0][0])
        while returning and returning[0][0] <= now:
            done, count = heapq.heappop(returning)
            waiting += [done] * count
        batch, waiting = waiting[:max_batch], waiting[max_batch:]
        seconds = times.batch(len(batch), len(batch))
        waits += [now + seconds - came for came in batch]
        busy += seconds
        heapq.heappush(returning, (now + seconds, len(batch)))
        heapq.heappush(free, now + seconds)
    last = max(free)
    return _outcome(waits, last, busy / (last * encoders))


def fewest(enough: Callable[[int], bool], least: int, most: int) -> int | None:
    """The smallest number that is enough, where more never is worse; None if `most` is not."""
    if not enough(most):
        return None
    low, high = least, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def _outcome(waits: list[float], seconds: float, busy: float) -> Outcome:
    p50, p99 = np.quantile(waits, [0.5, 0.99])
    return Outcome(len(waits) / seconds, float(p50), float(p99), busy)
