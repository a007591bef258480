"""A simulation of closed-loop clients, as `benchmarks.capacity` simulates open-loop requests."""

from __future__ import annotations

import heapq

from benchmarks.capacity import REQUESTS, Outcome, ServiceTimes, outcome_of


def closed_loop(times: ServiceTimes, clients: int, encoders: int, max_batch: int, requests: int = REQUESTS) -> Outcome:
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
    return outcome_of(waits, last, busy / (last * encoders))
