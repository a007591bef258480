"""Fetching of images by URL, for ingest and serving: the only code that fetches URLs from outside.

Every hop, redirects included, is checked: the URL is in the operator's list (:mod:`core.addresses`), its name is
resolved once, and every address is public or in an allowed network (:func:`is_allowed`). The connection goes to those
addresses, so that a second look-up cannot lead elsewhere. ``Host``, SNI and the certificate keep the name. Proxies and
credentials from the environment are not used. Bytes are counted as they arrive, one deadline covers all hops, and
compressed bodies are rejected.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpcore
import httpx

from core.addresses import PORTS, AllowRule
from core.errors import RecordError

log = logging.getLogger(__name__)
MAX_URL_CHARS = 2048
MAX_REDIRECTS = 4
MAX_ADDRESSES = 4
REDIRECTS = (301, 302, 303, 307, 308)
FAILURES = (
    httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol, OSError,
)  # fmt: skip

RETRIED_STATUSES = frozenset({408, 425, 429, *range(500, 600)})
"""Statuses worth a retry (RFC 9110, RFC 6585, RFC 8470)."""

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]


@dataclass(frozen=True, slots=True)
class Rules:
    places: Sequence[str]
    """Entries as in :mod:`core.addresses`; without any, nothing is fetched."""
    networks: Sequence[str]
    """Networks allowed although they are not public."""
    max_bytes: int
    seconds: float
    """Per image, redirects included."""
    connections: int = 16
    stall_seconds: float | None = None
    """Longest time for a connection, or without a byte; None: half of ``seconds``."""
    rules_setting: str = "serve.image_hosts"
    networks_setting: str = "serve.image_networks"


class ByteBudget:
    def __init__(self, size: int) -> None:
        self.size = size
        self.left = size

    def spend(self, count: int) -> None:
        """Raises RecordError ``image_too_large`` when the budget is used up."""
        self.left -= count
        if self.left < 0:
            raise RecordError(
                "image_too_large", f"the images have more than {self.size} bytes together.", "Send fewer at once."
            )


class Fetcher:
    """Fetches within :class:`Rules`. ``resolve``: addresses of a host and port; default: the system's resolver.
    ``trust``: trusted certificates; default: those of the system and of certifi."""

    def __init__(self, rules: Rules, resolve: Resolver | None = None, trust: ssl.SSLContext | None = None) -> None:
        self.rules = rules
        self.resolve = resolve or SystemResolver(rules.connections)
        self.places = [AllowRule.parse(text) for text in rules.places]
        self.networks = networks_of(rules.networks)
        self._trust = trust or httpcore.default_ssl_context()
        self._seats = asyncio.Semaphore(rules.connections)

    async def fetch(self, url: str, budget: ByteBudget | None = None) -> bytes:
        """Fetch an image by http or https, without credentials. Several fetches may share a ``budget``. Raises
        RecordError: ``uri_not_allowed``, ``uri_unreachable`` (a TransientFetchError if a retry may help),
        ``image_too_large`` or ``image_format``."""
        async with self._seats:
            try:
                async with asyncio.timeout(self.rules.seconds):
                    return await self._follow(url, budget or ByteBudget(self.rules.max_bytes))
            except TimeoutError:
                raise TransientFetchError(f"{shown(url)} took longer than {self.rules.seconds:g} s.") from None

    def origin(self, url: str) -> str:
        """Host and port of a URL. Raises RecordError ``uri_not_allowed`` if it may not be fetched."""
        checked = self._checked(url, None)
        return f"{checked.raw_host.decode('ascii')}:{checked.port or PORTS[checked.scheme]}"

    def close(self) -> None:
        if isinstance(self.resolve, SystemResolver):
            self.resolve.close()

    async def _follow(self, url: str, budget: ByteBudget) -> bytes:
        here = self._checked(url, None)
        for _ in range(MAX_REDIRECTS + 1):
            try:
                answer = await self._hop(here, budget)
            except FAILURES as error:
                # The network's message may contain internal addresses: log it, but do not show it to the caller.
                log.info("%s could not be fetched: %s: %s", shown(str(here)), type(error).__name__, error)
                broken = isinstance(error, httpcore.ProtocolError)
                how = f"answers what is not HTTP: {str(error)[:200]}" if broken else "cannot be reached"
                kind = TransientFetchError if _may_pass(error) else _unreachable
                raise kind(f"{shown(str(here))} {how}.") from error
            if isinstance(answer, bytes):
                return answer
            here = self._checked(answer, here)
        raise _unreachable(f"{shown(url)} is redirected more than {MAX_REDIRECTS} times.")

    def _checked(self, text: str, came_from: httpx.URL | None) -> httpx.URL:
        try:
            if len(text) > MAX_URL_CHARS:
                raise ValueError(f"it is longer than {MAX_URL_CHARS} characters")
            url = httpx.URL(text) if came_from is None else came_from.join(text)
            host, port = url.raw_host.decode("ascii"), url.port
        except (httpx.InvalidURL, ValueError) as error:
            raise self._not_allowed(f"{shown(text)} is no URL that is taken: {error}.") from None
        if url.userinfo:
            raise self._not_allowed(f"{shown(text)} carries credentials, which are not taken.")
        if came_from is not None and came_from.scheme == "https" and url.scheme != "https":
            raise self._not_allowed(f"{shown(str(came_from))} redirects from https to {url.scheme[:20] or 'nothing'}.")
        path = url.raw_path.decode("ascii").partition("?")[0]
        if not any(place.covers(url.scheme, host, port, path) for place in self.places):
            raise self._not_allowed(f"{shown(str(url))} is not an address that images may be fetched from.")
        return url

    async def _hop(self, url: httpx.URL, budget: ByteBudget) -> bytes | str:
        port = url.port or PORTS[url.scheme]
        pinned = PinnedBackend(await self._addresses(url, port))
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=port, target=url.raw_path)
        headers = [
            ("Host", url.netloc.decode("ascii")), ("User-Agent", "ratchet"), ("Accept", "image/*"),
            ("Accept-Encoding", "identity"), ("Connection", "close"),
        ]  # fmt: skip
        # Each step gets a share of the time, so that a name's second address is tried too.
        stall = self.rules.stall_seconds or self.rules.seconds / 2
        steps = dict.fromkeys(("connect", "read", "write", "pool"), stall)
        async with (
            httpcore.AsyncConnectionPool(
                self._trust, max_connections=1, max_keepalive_connections=0, network_backend=pinned
            ) as pool,
            pool.stream("GET", target, headers=headers, extensions={"timeout": steps}) as response,
        ):
            head = {name.lower(): value.decode("latin-1") for name, value in response.headers}
            if response.status in REDIRECTS and b"location" in head:
                return head[b"location"]
            self._check_head(url, response.status, head)
            data = bytearray()
            async for chunk in response.aiter_stream():
                data += chunk
                budget.spend(len(chunk))
                if len(data) > self.rules.max_bytes:
                    raise self._too_large(url)
            return bytes(data)

    def _check_head(self, url: httpx.URL, status: int, head: dict[bytes, str]) -> None:
        if status in RETRIED_STATUSES:
            retry_after = parse_retry_after(head.get(b"retry-after", ""))
            raise TransientFetchError(f"{shown(str(url))} answers {status}.", retry_after)
        if status != 200:
            raise _unreachable(f"{shown(str(url))} answers {status}.")
        kind = head.get(b"content-type", "").partition(";")[0].strip().lower()
        if kind and not kind.startswith("image/") and kind not in ("application/octet-stream", "binary/octet-stream"):
            raise RecordError("image_format", f"{shown(str(url))} is {kind[:80]!r}.", "Give the URL of an image.")
        if head.get(b"content-encoding", "identity").strip().lower() != "identity":
            raise _unreachable(f"{shown(str(url))} is sent compressed, which was not asked for.")
        if b"transfer-encoding" in head and b"content-length" in head:
            raise _unreachable(f"{shown(str(url))} declares its length in two ways.")
        if int(head.get(b"content-length", "0")) > self.rules.max_bytes:
            raise self._too_large(url)

    async def _addresses(self, url: httpx.URL, port: int) -> list[str]:
        host = url.raw_host.decode("ascii")
        addresses = list(dict.fromkeys(await self.resolve(host, port)))
        if not addresses:
            raise _unreachable(f"{host} has no address.")
        refused = [address for address in addresses if not is_allowed(address, self.networks)]
        if refused:  # even if others are public: such a name leads inside on purpose, or by mistake
            log.warning("%s was not fetched: %s has the address %s", shown(str(url)), host, refused[0])
            raise self._not_allowed(
                f"{host} has an address that is not public.",
                f"An operator can name its network in `{self.rules.networks_setting}`.",
            )
        return addresses[:MAX_ADDRESSES]

    def _not_allowed(self, message: str, fix: str = "") -> RecordError:
        fix = fix or f"Send the image itself, or ask an operator to list its host in `{self.rules.rules_setting}`."
        return RecordError("uri_not_allowed", message, fix)

    def _too_large(self, url: httpx.URL) -> RecordError:
        return RecordError(
            "image_too_large", f"{shown(str(url))} has more than {self.rules.max_bytes} bytes.", "Scale it down."
        )


class SystemResolver:
    """The system's resolver, in its own threads: one that hangs delays neither decoding nor shutdown."""

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, "resolve")

    async def __call__(self, host: str, port: int) -> list[str]:
        look_up = asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return [str(each[4][0]) for each in await look_up]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class TransientFetchError(RecordError):
    """A failure to fetch an image that may be temporary. ``reason`` is ``uri_unreachable``; ``retry_after`` is in
    seconds, as the server asked."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__("uri_unreachable", message, "Check the address, or send the image itself.")
        self.retry_after = retry_after


def parse_retry_after(text: str, now: datetime | None = None) -> float | None:
    """Seconds of a ``Retry-After`` header (a number or an HTTP date); None if it is neither."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        then = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    aware = then.replace(tzinfo=UTC) if then.tzinfo is None else then
    return max(0.0, (aware - (now or datetime.now(UTC))).total_seconds())


def shown(url: str) -> str:
    """A URL for messages and logs: without its query, which is often a key, and without credentials."""
    bare = url.partition("?")[0].partition("#")[0]
    scheme, slashes, rest = bare.partition("://")
    host, slash, path = rest.partition("/")
    return repr(f"{scheme}{slashes}{host.rpartition('@')[2]}{slash}{path}"[:200])


def _may_pass(error: Exception) -> bool:
    if isinstance(error, httpcore.RemoteProtocolError):  # httpcore and h11 also report broken connections as this
        return str(error).startswith(("Server disconnected", "peer closed connection"))
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    certificate = isinstance(error.__cause__, ssl.SSLCertVerificationError)
    return isinstance(error, (httpcore.TimeoutException, httpcore.NetworkError, OSError)) and not certificate


def _unreachable(message: str) -> RecordError:
    return RecordError("uri_unreachable", message, "Check the address, or send the image itself.")


# Public unicast addresses are allowed. Loopback, private, link-local (cloud metadata), multicast, reserved and
# documentation addresses are not, nor are those that embed an IPv4 address (mapped, 6to4, Teredo, NAT64), to which a
# gateway would forward the connection. An operator can allow further networks.
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))
_TRANSITION = (*_NAT64, ipaddress.IPv6Network("::ffff:0:0/96"), ipaddress.IPv6Network("2002::/16"),
               ipaddress.IPv6Network("2001::/32"))  # fmt: skip
_SPECIAL: tuple[Network, ...] = (
    ipaddress.IPv4Network("192.88.99.0/24"),  # 6to4 relays
    ipaddress.IPv4Network("168.63.129.16/32"),  # public, but Azure's machines reach their host's agent there
    ipaddress.IPv6Network("3fff::/20"),  # documentation; newer than Python's own list
)


def networks_of(texts: Sequence[str]) -> list[Network]:
    return [ipaddress.ip_network(text) for text in texts]


def is_allowed(address: str, networks: Sequence[Network] = ()) -> bool:
    """True if ``address`` is public, or in one of ``networks``. An embedded IPv4 address must be allowed too: allowing
    NAT64's prefix opens no private address."""
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
    """Connects to the first of ``addresses`` that answers, whatever the host name. For one connection."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self.addresses = addresses
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to one of the addresses. Raises httpcore's ConnectError or ConnectTimeout for the last one."""
        *others, last = self.addresses
        for address in others:
            try:
                return await self._network.connect_tcp(address, port, timeout)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return await self._network.connect_tcp(last, port, timeout)
