"""The trainer gives way to serving: it computes less of the time while requests take longer than before.

The server's own count of latencies is read between steps. A route is slow when its requests of the last moments took,
on average, more than so many times what they did in the minutes before the update began. Then the share of time that
the trainer takes is halved, down to a least one; it grows again, in tenths, while nothing is slow (additive increase
and multiplicative decrease, as in TCP). Results never depend on it: it decides when a step is computed, and not what.

It looks at the mean because that is what a share of time can move: a trainer that computes a quarter of the time slows
a quarter of the requests, and the p99 is made of those. What a single request feels is a matter of priority, which is
in ``updater/service/process.py``.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from core.progress import say
from ratchet_client import Client, ServerError

POLL_SECONDS = 5.0
WINDOW_REQUESTS = 50
"""Requests of one route whose mean is compared."""
WINDOW_SECONDS = 60.0
"""After this long without enough requests, no one is there to be slowed down."""
BEFORE_SECONDS = 600.0
"""Requests of so long before an update are what later ones are compared with: a busy hour of yesterday is not."""
GROWTH = 0.1
METRIC = "ratchet_http_request_seconds"


class Took(NamedTuple):
    """Requests of a route since the server started, and the seconds that they took together."""

    requests: float = 0.0
    seconds: float = 0.0


Latencies = Mapping[str, Took]
"""By route."""


class Throttle:
    """The share of its time that the trainer may compute, between ``least`` and 1; ask it between steps.

    >>> throttle = Throttle(lambda: latencies(client), most_ratio=1.25, least=0.25)
    >>> throttle.begin()
    >>> throttle()
    1.0
    """

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
        """Nothing is trained: remember, about once a minute, what the server has answered until now."""
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
        """An update begins: what was answered since it was first watched is what later requests are compared with.

        A route with too few requests since then is compared with all that it answered, as is everything when nothing
        was watched: the updater has just been started.
        """
        totals = self.read() or {}
        then = self._seen[0][1] if self._seen else {}
        self._seen.clear()
        lately = {route: _since(took, then.get(route, Took())) for route, took in totals.items()}
        self._before = {
            route: took if took.requests >= WINDOW_REQUESTS else totals[route] for route, took in lately.items()
        }
        self._open(totals)

    def __call__(self) -> float:
        """The share now; looks at the server when it did not for a while."""
        now = self.clock()
        if now - self._polled >= POLL_SECONDS:
            self._polled = now
            self._look(self.read())
        return self.share

    def _look(self, totals: Latencies | None) -> None:
        if totals is None:  # no one is served, so that nothing is in the way
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
        """Mean of a route lately over its mean before the update; 0 where too few requests tell."""
        before = self._before.get(route, Took())
        if min(lately.requests, before.requests) < WINDOW_REQUESTS:
            return 0.0
        return (lately.seconds / lately.requests) / (before.seconds / before.requests)

    def _open(self, totals: Latencies) -> None:
        self._window, self._began = totals, self.clock()

    def _set(self, share: float, why: str) -> None:
        bounded = min(1.0, max(self.least, share))
        if bounded != self.share:
            say(f"the trainer takes {bounded:.0%} of its time: {why}")
        self.share = bounded


def latencies(client: Client) -> Latencies | None:
    """Latencies of a server's API routes from ``/metrics``; None when it does not answer."""
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
    """True if the server has restarted its counters."""
    return any(now.get(route, Took()).requests < took.requests for route, took in then.items())
