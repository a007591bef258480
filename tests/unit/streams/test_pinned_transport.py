"""Which addresses may be connected to, and how an operator writes places."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from core.allow_rules import AllowRule
from core.settings.serving import Serve
from streams.records.fetching import is_allowed, networks_of

PUBLIC = ["8.8.8.8", "1.1.1.1", "100.63.255.255", "172.32.0.1", "2606:4700:4700::1111", "2a00:1450:4001:82b::200e"]
INSIDE = {
    "loopback": ["127.0.0.1", "127.255.255.254", "::1"],
    "private": ["10.0.0.1", "172.16.0.1", "192.168.1.1", "fd00::1", "fc00::1", "fec0::1"],
    "shared by a provider": ["100.64.0.1", "100.100.100.200"],
    "link-local, cloud metadata": ["169.254.169.254", "fe80::1", "fe80::1%eth0", "fd00:ec2::254", "168.63.129.16"],
    "unspecified": ["0.0.0.0", "0.1.2.3", "::"],
    "multicast, broadcast": ["224.0.0.1", "239.255.255.250", "255.255.255.255", "ff02::1"],
    "reserved": ["240.0.0.1", "192.0.0.1", "198.18.0.1", "192.88.99.1", "100::1", "5f00::1", "4000::1"],
    "documentation": ["192.0.2.1", "198.51.100.1", "203.0.113.1", "2001:db8::1", "3fff::1"],
    "IPv4 inside": [
        "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "::8.8.8.8", "64:ff9b::7f00:1", "64:ff9b::808:808",
        "64:ff9b:1::808:808", "2002:7f00:1::", "2002:808:808::1", "2001:0:808:808::1",
    ],
}  # fmt: skip


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address: str) -> None:
    assert is_allowed(address)


@pytest.mark.parametrize("address", [each for group in INSIDE.values() for each in group])
def test_all_others_are_not(address: str) -> None:
    assert not is_allowed(address)


def test_a_named_network_is_allowed_and_nothing_else() -> None:
    networks = networks_of(["10.1.0.0/16", "fd00:1::/32", "192.0.2.7"])
    assert all(is_allowed(address, networks) for address in ("10.1.2.3", "fd00:1::9", "192.0.2.7", "8.8.8.8"))
    assert not any(
        is_allowed(address, networks) for address in ("10.2.0.1", "fd00:2::9", "192.0.2.8", "::ffff:a01:203")
    )


def test_the_prefix_of_nat64_opens_public_addresses_only() -> None:
    networks = networks_of(["64:ff9b::/96"])
    assert is_allowed("64:ff9b::808:808", networks)
    assert not is_allowed("64:ff9b::7f00:1", networks)
    assert is_allowed("64:ff9b::a01:203", [*networks, *networks_of(["10.1.0.0/16"])])


@pytest.mark.parametrize(
    ("rule", "inside", "outside"),
    [
        ("cdn.example.org", ["http://cdn.example.org/a", "https://cdn.example.org/"], [
            "https://cdn.example.org:8443/a", "http://cdn.example.org:443/a", "https://example.org/a",
            "https://a.cdn.example.org/", "https://cdn.example.org.evil.net/", "https://xcdn.example.org/",
        ]),
        ("cdn.example.org:8443", ["https://cdn.example.org:8443/"], ["https://cdn.example.org/"]),
        ("*.example.net", ["https://a.example.net/", "http://a.b.example.net/x"], [
            "https://example.net/", "https://badexample.net/", "https://a.example.net.evil.org/",
        ]),
        ("https://example.org/images/", ["https://example.org/images/a"], [
            "http://example.org/images/a", "https://example.org/imagesque", "https://example.org/images/../secret",
            "https://example.org/images/%2e%2e/secret", "https://example.org/images/..%5csecret",
        ]),
        ("*", ["https://anything.example/x", "http://8.8.8.8/"], ["https://anything.example:81/x", "ftp://a/"]),
        ("https://[2001:db8::1]/", ["https://[2001:db8::1]/x"], ["https://[2001:db8::2]/x"]),
        ("bücher.example", ["https://xn--bcher-kva.example/"], ["https://bucher.example/"]),
    ],
)  # fmt: skip
def test_a_place_covers_what_it_says(rule: str, inside: list[str], outside: list[str]) -> None:
    from urllib.parse import urlsplit

    def covered(url: str) -> bool:
        parts = urlsplit(url)
        return AllowRule.parse(rule).covers(parts.scheme, parts.hostname or "", parts.port, parts.path)

    assert [url for url in inside if not covered(url)] == []
    assert [url for url in outside if covered(url)] == []


@pytest.mark.parametrize(
    "rule",
    ["", "file:///etc", "ftp://a.example", "user@a.example", "a.*.example", "*foo.example", "a b", "a.example?x"],
)
def test_a_place_that_means_nothing_stops_the_start(rule: str) -> None:
    with pytest.raises(ValidationError):
        Serve(image_hosts=[rule])


def test_a_network_with_host_bits_stops_the_start() -> None:
    with pytest.raises(ValidationError, match="host bits"):
        Serve(image_networks=["10.1.0.1/16"])
