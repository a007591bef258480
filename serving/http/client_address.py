"""Callers: the address of a request, the names of this server, and rate limits."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.types import Scope

MAX_HOPS = 16
"""Entries of ``X-Forwarded-For`` that are considered, counted from the last one."""
PROXY_HEADERS = ("forwarded", "via", "x-real-ip", "x-forwarded-host", "x-forwarded-proto")
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
MAX_CALLERS = 10_000
"""Buckets that are kept; the caller that has been idle longest starts again with a full bucket."""


class TrustedProxies:
    """Networks whose ``X-Forwarded-For`` is believed.

    >>> TrustedProxies(["10.0.0.0/8"]).client("10.0.0.1", ["198.51.100.7, 192.0.2.1"])
    '192.0.2.1'
    """

    def __init__(self, networks: Sequence[str]) -> None:
        self._networks: list[Network] = [ipaddress.ip_network(network, strict=False) for network in networks]

    def client(self, peer: str, forwarded: Sequence[str]) -> str:
        """The last hop that is not a trusted proxy. ``forwarded``: values of ``X-Forwarded-For`` in header order."""
        hops = _hops(forwarded)[-MAX_HOPS:]
        address = peer
        while hops and self.trusts(address):
            hop = hops.pop()
            if _parsed(hop) is None:  # "unknown", or not written by a trusted proxy
                break
            address = hop
        return address

    def trusts(self, address: str) -> bool:
        ip = _parsed(address)
        return ip is not None and any(ip in network for network in self._networks)


def set_client(scope: Scope, proxies: TrustedProxies) -> None:
    """Replace the proxy's address with the client's."""
    peer = scope.get("client")
    if peer:
        scope["client"] = (proxies.client(peer[0], Headers(scope=scope).getlist("x-forwarded-for")), peer[1])


def came_from_here(scope: Scope) -> bool:
    """False if a request says that it came from another machine, through a proxy on this one. The address of such a
    proxy is loopback. nginx's default configuration names no client, but speaks HTTP/1.0 (before 1.29.7), which
    browsers do not. These headers can only take rights away from a client."""
    headers, peer = Headers(scope=scope), scope.get("client")
    if scope.get("http_version") == "1.0" or any(name in headers for name in PROXY_HEADERS):
        return False
    address = _parsed(peer[0]) if peer else None
    hops = map(_parsed, _hops(headers.getlist("x-forwarded-for")))
    return (address is None or address.is_loopback) and all(ip is not None and ip.is_loopback for ip in hops)


def _hops(forwarded: Sequence[str]) -> list[str]:
    return [hop.strip() for line in forwarded for hop in line.split(",")]


def came_by_tls(scope: Scope) -> bool:
    """True if the client's connection has TLS, which may end at a proxy. A client that lies deceives only itself."""
    forwarded = Headers(scope=scope).get("x-forwarded-proto", "").partition(",")[0].strip().lower()
    return scope.get("scheme") == "https" or forwarded == "https"


def names_this_server(host: str | None, allowed: Sequence[str]) -> bool:
    """True for a ``Host`` header of loopback or one of ``allowed``, or without one: browsers always send it. Protects
    from DNS rebinding: a page whose name resolves to 127.0.0.1 still sends its own name."""
    if not host:
        return True
    host = host.lower()
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    name = name.rstrip(".")
    if name == "localhost" or name in {each.lower() for each in allowed}:
        return True
    ip = _parsed(name)
    return ip is not None and ip.is_loopback


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return None
    return getattr(ip, "ipv4_mapped", None) or ip


class RateLimiter:
    """A token bucket for each caller, in the memory of each ingress process: with N requests a minute, N at once and
    one more every 60/N seconds. ``replicas``: processes that share a caller's requests; each grants N / replicas,
    rounded up."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, most: int = MAX_CALLERS, replicas: int = 1) -> None:
        self._replicas = replicas
        self._clock = clock
        self._most = most
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, who: str, per_minute: int) -> float:
        """Take one request from a caller's bucket; returns 0 or the seconds until there is one. ``per_minute`` 0: no
        limit."""
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
    """The bucket of an anonymous request: its IPv4 address, or its /64 network, which one IPv6 host has. Behind a proxy
    that is not in ``serve.trusted_proxies`` all anonymous callers share one bucket."""
    client = scope.get("client")
    ip = _parsed(client[0] if client else "")
    if isinstance(ip, ipaddress.IPv6Address):
        return f"address:{ipaddress.ip_network((ip, 64), strict=False)}"
    return f"address:{ip or 'unknown'}"
