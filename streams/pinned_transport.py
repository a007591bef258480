"""The network below an HTTP connection: it goes to given addresses only, and what comes in is counted.

httpcore asks its backend to connect to a *name*; this one was told before which addresses that is. How a body is longer
than declared cannot be seen above: h11 hands over as many bytes as were declared, and nobody looks at the rest.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Sequence
from typing import Any

import httpcore


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
