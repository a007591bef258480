"""How often one may call: a token bucket for each caller, in the memory of each ingress process."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.types import Scope

MAX_CALLERS = 10_000
"""Buckets that are kept. Who has not called for longest is forgotten, and begins again with a full bucket."""


class RateLimiter:
    """A caller with N requests a minute may make N at once, and gets one back every 60/N seconds.

    Args:
        replicas: processes over which callers' requests are spread; each grants its part of N, rounded up.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, most: int = MAX_CALLERS, replicas: int = 1) -> None:
        self._replicas = replicas
        self._clock = clock
        self._most = most
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, who: str, per_minute: int) -> float:
        """Take one request from a caller's bucket. 0, or the seconds until there is one. No limit where it is 0."""
        if not per_minute:
            return 0.0
        per_minute = -(-per_minute // self._replicas)
        now = self._clock()
        level, since = self._buckets.pop(who, (float(per_minute), now))
        level = min(float(per_minute), level + (now - since) * per_minute / 60)
        wait = 0.0 if level >= 1 else (1 - level) * 60 / per_minute
        self._buckets[who] = (level - 1 if not wait else level, now)
        if len(self._buckets) > self._most:
            self._buckets.popitem(last=False)
        return wait


def address(scope: Scope) -> str:
    """Whose bucket an anonymous request is taken from: its IPv4 address, or the /64 network that one IPv6 host has.

    Behind a proxy that is not in ``serve.trusted_proxies`` that is the proxy's address, so all anonymous callers share
    one bucket.
    """
    client = scope.get("client")
    try:
        ip = ipaddress.ip_address(client[0] if client else "")
    except ValueError:
        return "address:unknown"
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is None:
        return f"address:{ipaddress.ip_network((ip, 64), strict=False)}"
    return f"address:{getattr(ip, 'ipv4_mapped', None) or ip}"
