"""The network below an HTTP connection to a host that somebody else named: only to addresses that are allowed.

Public unicast addresses are; loopback, private, link-local (cloud metadata), multicast, reserved and documentation
addresses are not, and neither are those that carry an IPv4 address inside (mapped, 6to4, Teredo, NAT64): a gateway
would take the connection on to that one. An operator can name networks that are allowed all the same.

httpcore asks its backend to connect to a *name*; :class:`PinnedBackend` was told before which addresses that is, and
counts what comes in. That a body is longer than declared cannot be seen above: h11 hands over as many bytes as were
declared, and nobody looks at the rest.
"""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import httpcore

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))
_TRANSITION = (*_NAT64, ipaddress.IPv6Network("::ffff:0:0/96"), ipaddress.IPv6Network("2002::/16"),
               ipaddress.IPv6Network("2001::/32"))  # fmt: skip
_SPECIAL: tuple[Network, ...] = (
    ipaddress.IPv4Network("192.88.99.0/24"),  # 6to4 relays
    ipaddress.IPv4Network("168.63.129.16/32"),  # a public address, but Azure's machines reach their host's agent there
    ipaddress.IPv6Network("3fff::/20"),  # documentation; newer than Python's own list
)


def networks_of(texts: Sequence[str]) -> list[Network]:
    """Networks as an operator writes them. Raises ValueError."""
    return [ipaddress.ip_network(text) for text in texts]


def is_allowed(address: str, networks: Sequence[Network] = ()) -> bool:
    """Whether ``address`` is public, or in one of ``networks``.

    An IPv4 address inside of an IPv6 one has to be allowed too: naming NAT64's prefix opens no private address.
    """
    parsed = ipaddress.ip_address(address)
    return all(_is_public(each) or any(each in network for network in networks) for each in _with_embedded(parsed))


def _with_embedded(address: Address) -> Iterator[Address]:
    yield address
    if isinstance(address, ipaddress.IPv6Address):
        inner = (address.ipv4_mapped, address.sixtofour, *(address.teredo or ()))
        yield from (each for each in inner if each is not None)
        if any(address in network for network in _NAT64):
            yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)


def _is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address) and (
        address not in _UNICAST or address.scope_id or any(address in network for network in _TRANSITION)
    ):
        return False
    special = address.is_multicast or address.is_reserved or any(address in network for network in _SPECIAL)
    return address.is_global and not special


class PinnedBackend(httpcore.AsyncNetworkBackend):
    """Connects to the first of ``addresses`` that answers, whatever the host is called. For one connection."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self.addresses = addresses
        self._wire: CountingStream | None = None
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """A connection to one of the addresses. Raises httpcore's ConnectError or ConnectTimeout for the last one."""
        *others, last = self.addresses
        for address in others:
            try:
                return self._counted(await self._network.connect_tcp(address, port, timeout))
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return self._counted(await self._network.connect_tcp(last, port, timeout))

    def body_begins(self) -> None:
        """The head has been read: what comes from now on is the body."""
        if self._wire is not None:
            self._wire.in_head = False

    @property
    def arrived(self) -> int:
        """Bytes behind the head that have come in, whether or not anybody read them."""
        return 0 if self._wire is None else self._wire.passed + len(self._wire.buffered)

    def _counted(self, stream: httpcore.AsyncNetworkStream) -> CountingStream:
        self._wire = CountingStream(stream)
        return self._wire


class CountingStream(httpcore.AsyncNetworkStream):
    """Hands over the head line by line, so that no byte of the body goes with it, and counts from there on."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self.stream = stream
        self.in_head = True
        self.buffered = b""
        self.passed = 0

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Some bytes; none at the end."""
        if not self.buffered:
            self.buffered = await self.stream.read(max_bytes, timeout)
        end = self.buffered.find(b"\n") + 1 if self.in_head else 0
        piece = self.buffered[: end or max_bytes]
        self.buffered = self.buffered[len(piece) :]
        if not self.in_head:
            self.passed += len(piece)
        return piece

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send all of it."""
        await self.stream.write(buffer, timeout)

    async def aclose(self) -> None:
        """Close the connection."""
        await self.stream.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        """The same, encrypted."""
        self.stream = await self.stream.start_tls(ssl_context, server_hostname, timeout)
        return self

    def get_extra_info(self, info: str) -> Any:
        """What the connection knows about itself."""
        return self.stream.get_extra_info(info)
