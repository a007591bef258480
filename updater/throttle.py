"""How far the trainer gives way to serving: it computes less of the time while requests take longer than before.

The server's own histogram of latencies is read between steps. A route is slow when its p99, in the requests of the
last moments, is more than so many times what it was before the update began. Then the share of time that the trainer
takes is halved, down to a least one; it grows again, in tenths, while nothing is slow (additive increase and
multiplicative decrease, as in TCP). Results never depend on it: it decides when a step is computed, and not what.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from itertools import pairwise

from prometheus_client.parser import text_string_to_metric_families

from ops.progress import say
from serving.client import Client, ServerError

POLL_SECONDS = 5.0
WINDOW_REQUESTS = 200
"""Requests of one route whose p99 is compared; with fewer it is their second worst, and says little."""
WINDOW_SECONDS = 60.0
"""After this long without enough requests, nobody is there who could be slowed down."""
GROWTH = 0.1
METRIC = "ratchet_http_request_seconds_bucket"

Buckets = Mapping[float, float]
"""Requests that took at most so many seconds (cumulative, as Prometheus has them); the last bound is infinite."""
Latencies = Mapping[str, Buckets]
"""Buckets of each route, counted since the server started."""


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
        self._before: Latencies = {}
        self._window: Latencies | None = None
        self._began = self._polled = -math.inf

    def begin(self) -> None:
        """An update begins: what the server has answered until now is what later requests are compared with."""
        self._before = self.read() or {}
        self._open(self._before)

    def __call__(self) -> float:
        """The share now; looks at the server when it did not for a while."""
        now = self.clock()
        if now - self._polled >= POLL_SECONDS:
            self._polled = now
            self._look(self.read())
        return self.share

    def _look(self, found: Latencies | None) -> None:
        if found is None:  # nobody is served, so that nobody is in the way
            self._set(1.0, "the server does not answer")
            return
        if self._window is None or _restarted(found, self._window):
            self._before = {} if self._window is not None else self._before
            self._open(found)
            return
        counts = {route: _since(buckets, self._window.get(route, {})) for route, buckets in found.items()}
        if max((_total(each) for each in counts.values()), default=0) < WINDOW_REQUESTS:
            if self.clock() - self._began < WINDOW_SECONDS:
                return
            self._set(self.share + GROWTH, "there are few requests")
        else:
            worst, route = max((self._ratio(route, each), route) for route, each in counts.items())
            slow = worst > self.most_ratio
            share = self.share / 2 if slow else self.share + GROWTH
            self._set(share, f"the p99 of {route} is {worst:.2f} times what it was" if worst else "serving is quick")
        self._open(found)

    def _ratio(self, route: str, counts: Buckets) -> float:
        """p99 of a route now over its p99 before the update; 0 where too few requests tell."""
        before = self._before.get(route, {})
        if min(_total(counts), _total(before)) < WINDOW_REQUESTS:
            return 0.0
        return quantile(counts, 0.99) / quantile(before, 0.99)

    def _open(self, found: Latencies) -> None:
        self._window, self._began = found, self.clock()

    def _set(self, share: float, why: str) -> None:
        bounded = min(1.0, max(self.least, share))
        if bounded != self.share:
            say(f"the trainer takes {bounded:.0%} of its time: {why}")
        self.share = bounded


def latencies(client: Client) -> Latencies | None:
    """What a server tells of its API's routes at ``/metrics``; None when it does not answer."""
    try:
        page = client.metrics()
    except ServerError:
        return None
    lines = "\n".join(line for line in page.splitlines() if line.startswith(METRIC)) + "\n"
    found: dict[str, dict[float, float]] = {}
    for family in text_string_to_metric_families(lines):
        for sample in family.samples:
            if sample.labels["route"].startswith("/v1"):
                found.setdefault(sample.labels["route"], {})[float(sample.labels["le"])] = sample.value
    return {route: dict(sorted(buckets.items())) for route, buckets in found.items()}


def quantile(counts: Buckets, share: float) -> float:
    """Seconds, as ``histogram_quantile`` of Prometheus has it: linear within a bucket, the last finite bound above."""
    rank = share * _total(counts)
    for (low, below), (high, upto) in pairwise([(0.0, 0.0), *counts.items()]):
        if upto >= rank:
            return low if math.isinf(high) else low + (high - low) * (rank - below) / (upto - below)
    return 0.0


def _total(counts: Buckets) -> float:
    return max(counts.values(), default=0.0)


def _since(now: Buckets, then: Buckets) -> Buckets:
    return {bound: count - then.get(bound, 0.0) for bound, count in now.items()}


def _restarted(now: Latencies, then: Latencies) -> bool:
    """Whether the server counts anew."""
    return any(_total(now.get(route, {})) < _total(buckets) for route, buckets in then.items())
