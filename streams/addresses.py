"""Which addresses of the network may be connected to when somebody else named the host.

Public unicast addresses are; loopback, private, link-local (cloud metadata), multicast, reserved and documentation
addresses are not, and neither are those that carry an IPv4 address inside (mapped, 6to4, Teredo, NAT64): a gateway
would take the connection on to that one. An operator can name networks that are allowed all the same.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence

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
