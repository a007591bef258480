"""Trainer back-off: it computes less of the time while requests take longer than before.

The server's latency counters are read between steps. A route is slow if its recent requests took, on average, more than
a given ratio of their mean in the minutes before the update. The trainer's share of time is then halved, down to a
minimum; while nothing is slow it grows by tenths (additive increase and multiplicative decrease, as in TCP). Only the
time at which a step is computed depends on it, never the result. The mean is what a share of time can change: a trainer
that computes a quarter of the time slows a quarter of the requests, which make up the p99. Single requests are
protected by priority (``updater/service/process.py``).
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from core.progress import progress_log
from ratchet_client import Client, ServerError

POLL_SECONDS = 5.0
WINDOW_REQUESTS = 50
WINDOW_SECONDS = 60.0
"""After this long without enough requests, traffic counts as low, and the share grows."""
BEFORE_SECONDS = 600.0
"""Period before an update that later requests are compared with: a busy hour of yesterday does not count."""
GROWTH = 0.1
METRIC = "ratchet_http_request_seconds"


class Took(NamedTuple):
    """Requests of a route since the server started, and their total seconds."""

    requests: float = 0.0
    seconds: float = 0.0


Latencies = Mapping[str, Took]


class Throttle:
    """Share of time in which the trainer may compute, between ``least`` and 1; call it between steps."""

    def __init__(
        self, read: Callable[[], Latencies | None], most_ratio: float, least: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.read = read
        self.most_ratio = most_ratio
        self.least = least
        self.clock = clock
        self.share = 1.0
        self._seen: deque[tuple[float, Latencies]] = deque()
        self._before: Latencies = {}
        self._window: Latencies | None = None
        self._began = self._polled = -math.inf

    def watch(self) -> None:
        """Record the server's totals about once a minute, while nothing is trained."""
        now = self.clock()
        if self._seen and now - self._seen[-1][0] < WINDOW_SECONDS:
            return
        totals = self.read()
        if totals is None or (self._seen and _restarted(totals, self._seen[-1][1])):
            self._seen.clear()
        if totals is not None:
            self._seen.append((now, totals))
        while len(self._seen) > 1 and self._seen[1][0] <= now - BEFORE_SECONDS:
            self._seen.popleft()

    def begin(self) -> None:
        """Start an update: later requests are compared with those since the first :meth:`watch`. A route with too few
        requests since then is compared with all it answered; so is every route if nothing was watched because the
        updater has just started."""
        totals = self.read() or {}
        then = self._seen[0][1] if self._seen else {}
        self._seen.clear()
        lately = {route: _since(took, then.get(route, Took())) for route, took in totals.items()}
        self._before = {
            route: took if took.requests >= WINDOW_REQUESTS else totals[route] for route, took in lately.items()
        }
        self._open(totals)

    def __call__(self) -> float:
        now = self.clock()
        if now - self._polled >= POLL_SECONDS:
            self._polled = now
            self._look(self.read())
        return self.share

    def _look(self, totals: Latencies | None) -> None:
        if totals is None:  # nothing is served, so nothing is slowed down
            self._set(1.0, "the server does not answer")
            return
        if self._window is None or _restarted(totals, self._window):
            self._before = {} if self._window is not None else self._before
            self._open(totals)
            return
        lately = {route: _since(took, self._window.get(route, Took())) for route, took in totals.items()}
        if max((took.requests for took in lately.values()), default=0) >= WINDOW_REQUESTS:
            worst, route = max((self._ratio(route, took), route) for route, took in lately.items())
            share = self.share / 2 if worst > self.most_ratio else self.share + GROWTH
            self._set(share, f"{route} takes {worst:.2f} times what it did" if worst else "nothing can be compared")
        elif self.clock() - self._began >= WINDOW_SECONDS:
            self._set(self.share + GROWTH, "there are few requests")
        else:
            return
        self._open(totals)

    def _ratio(self, route: str, lately: Took) -> float:
        before = self._before.get(route, Took())
        if min(lately.requests, before.requests) < WINDOW_REQUESTS:
            return 0.0
        return (lately.seconds / lately.requests) / (before.seconds / before.requests)

    def _open(self, totals: Latencies) -> None:
        self._window, self._began = totals, self.clock()

    def _set(self, share: float, why: str) -> None:
        bounded = min(1.0, max(self.least, share))
        if bounded != self.share:
            progress_log.info(f"the trainer takes {bounded:.0%} of its time: {why}")
        self.share = bounded


def latencies(client: Client) -> Latencies | None:
    """Latencies of a server's API routes from ``/metrics``; None if it does not answer."""
    try:
        page = client.metrics()
    except ServerError:
        return None
    lines = "\n".join(line for line in page.splitlines() if line.startswith((f"{METRIC}_count", f"{METRIC}_sum")))
    totals: dict[str, Took] = {}
    for family in text_string_to_metric_families(f"{lines}\n"):
        for sample in family.samples:
            route = sample.labels["route"]
            if route.startswith("/v1"):
                field = "requests" if sample.name.endswith("_count") else "seconds"
                totals[route] = totals.get(route, Took())._replace(**{field: sample.value})
    return totals


def _since(now: Took, then: Took) -> Took:
    return Took(now.requests - then.requests, now.seconds - then.seconds)


def _restarted(now: Latencies, then: Latencies) -> bool:
    return any(now.get(route, Took()).requests < took.requests for route, took in then.items())
