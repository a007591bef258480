from __future__ import annotations

import asyncio
import errno
import gzip
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import pytest
import trustme
from pydantic import ValidationError

from core.addresses import AllowRule
from core.errors import RecordError
from core.settings.serving import Serve
from streams.records.fetching import MAX_REDIRECTS, Fetcher, Rules, is_allowed, networks_of
from tests.support.web_server import WebServer, redirect, reply, web_server

PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4
MAX = 4096
LONG = 20.0
"""Seconds: no refusal of these tests takes nearly as long."""


class Names:
    """A resolver whose answers may change between look-ups; the last one stays."""

    def __init__(self, **hosts: Sequence[Sequence[str]]) -> None:
        self.hosts = {name.replace("_", "."): list(answers) for name, answers in hosts.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        answers = self.hosts[host]
        return answers.pop(0) if len(answers) > 1 else answers[0]


@pytest.fixture
def sites() -> Iterator[tuple[WebServer, WebServer]]:
    """Two servers on one port, of an address that is allowed and of one that is not."""
    with ExitStack() as stack:
        while True:  # a port that is free at one address may be in use at the other: the next one is another
            allowed = stack.enter_context(web_server())
            try:
                other = stack.enter_context(web_server("127.0.0.2", allowed.port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                break
        allowed.pages["/a.png"] = reply(PICTURE)
        other.pages["/a.png"] = other.pages["/secret"] = reply(b"secret")
        yield allowed, other


@pytest.fixture
def web(sites: tuple[WebServer, WebServer]) -> WebServer:
    return sites[0]


@pytest.fixture
def inside(sites: tuple[WebServer, WebServer]) -> WebServer:
    return sites[1]


def fetcher(web: WebServer, names: Names | None = None, places: Sequence[str] = (), **options: Any) -> Fetcher:
    found = names or Names(cdn_test=[["127.0.0.1"]])
    trust = options.pop("trust", None)
    rules = {"networks": ["127.0.0.1/32"], "max_bytes": MAX, "seconds": LONG} | options
    return Fetcher(Rules(places or [f"*:{web.port}"], **rules), found, trust)


def url(web: WebServer, path: str = "/a.png", host: str = "cdn.test", scheme: str = "http") -> str:
    return f"{scheme}://{host}:{web.port}{path}"


async def refusal(made: Fetcher, address: str) -> str:
    with pytest.raises(RecordError) as caught:
        await made.fetch(address)
    return f"{caught.value.reason}: {caught.value.message}"


async def test_an_image_comes_from_the_pinned_address_under_its_own_name_and_by_no_proxy(
    web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert await fetcher(web).fetch(url(web, "/a.png?size=9#top")) == PICTURE
    (asked,) = web.asked
    assert asked.startswith("GET /a.png?size=9 HTTP/1.1\r\n")
    assert f"Host: cdn.test:{web.port}\r\n" in asked and "Accept-Encoding: identity\r\n" in asked


async def test_a_redirect_is_followed_within_the_list_and_not_in_a_circle(web: WebServer) -> None:
    web.pages |= {"/moved": redirect("/b/../a.png"), "/far": redirect(url(web, "/moved"), "308 Permanent Redirect")}
    assert await fetcher(web).fetch(url(web, "/far")) == PICTURE
    web.asked.clear()
    web.pages["/circle"] = redirect("/circle")
    assert "redirected more than" in await refusal(fetcher(web), url(web, "/circle"))
    assert len(web.asked) == MAX_REDIRECTS + 1


async def test_an_address_inside_is_not_connected_to_whether_named_or_redirected_to(
    web: WebServer, inside: WebServer
) -> None:
    for addresses in (["127.0.0.2"], ["127.0.0.1", "127.0.0.2"], ["::ffff:127.0.0.1"], ["10.0.0.1"]):
        told = await refusal(fetcher(web, Names(cdn_test=[addresses])), url(web))
        assert told == "uri_not_allowed: cdn.test has an address that is not public."  # and not which one
    names = {"cdn_test": [["127.0.0.1"]], "inner_test": [["127.0.0.2"]], "127_0_0_2": [["127.0.0.2"]]}
    assert "uri_not_allowed" in await refusal(fetcher(web, Names(**names)), url(inside, host="127.0.0.2"))
    assert web.asked == []
    for to in (url(inside, "/secret", "inner.test"), url(inside, "/secret", "127.0.0.2")):
        web.pages["/moved"] = redirect(to)
        assert "not public" in await refusal(fetcher(web, Names(**names)), url(web, "/moved"))
    assert inside.asked == []


async def test_dns_that_changes_after_the_check_changes_nothing_and_is_checked_at_each_hop(
    web: WebServer, inside: WebServer
) -> None:
    names = Names(cdn_test=[["127.0.0.1"], ["127.0.0.2"]])
    assert await fetcher(web, names).fetch(url(web)) == PICTURE
    assert (names.asked, len(web.asked), inside.asked) == (["cdn.test"], 1, [])
    web.pages["/moved"] = redirect("/secret")
    names = Names(cdn_test=[["127.0.0.1"], ["127.0.0.2"]])
    assert "not public" in await refusal(fetcher(web, names), url(web, "/moved"))
    assert (len(web.asked), inside.asked) == (2, [])


async def test_the_systems_resolver_is_asked_by_default(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, *rest: Any, **options: Any) -> Any:
        seen.append(host)
        if host == "nowhere.test":
            raise socket.gaierror(-2, "Name or service not known")
        return real("127.0.0.1", *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    made = Fetcher(Rules([f"*:{web.port}"], ["127.0.0.1"], MAX, LONG))
    assert await made.fetch(url(web)) == PICTURE
    assert seen.count("cdn.test") == 1
    assert (await refusal(made, url(web, host="nowhere.test"))).startswith("uri_unreachable")


@pytest.mark.parametrize(
    "to",
    ["file:///etc/passwd", "http://other.test/a.png", "ftp://cdn.test/a.png", "data:image/png;base64,AAAA",
     "//evil.test/", "http://user:secret@cdn.test/a.png", "http://[::1", "javascript:alert(1)", "http://cdn.test:99999/",
     "", "cdn.test", "http://cdn.test/", "http://cdn.test:{port}@evil.test/", "http://user@cdn.test:{port}/a.png",
     "http://evil.test:{port}/a.png", "http://cdn.test:{port}/" + "a" * 3000, "http://cdn.test:{port}\\@evil.test/",
     "http://cdn.test:no/", "http://cdn.test.:{port}/a.png", "http:///a.png", "http://cdn.test:{port}/a\r\nx: y"],
)  # fmt: skip
async def test_an_address_out_of_the_list_is_refused_and_not_even_looked_up(web: WebServer, to: str) -> None:
    names, address = Names(cdn_test=[["127.0.0.1"]]), to.format(port=web.port)
    made = fetcher(web, names, [f"cdn.test:{web.port}"])
    told = await refusal(made, address)
    assert told.startswith("uri_not_allowed") and "secret" not in told
    assert names.asked == web.asked == []
    if to not in ("", "cdn.test", "http:///a.png") and "\r" not in to:  # those would lead to the same host again
        web.pages["/moved"] = redirect(address)
        told = await refusal(made, url(web, "/moved"))
        assert told.startswith("uri_not_allowed") and "secret" not in told
        assert len(web.asked) == 1


async def test_an_endless_body_is_cut_at_the_byte_that_is_too_many(web: WebServer) -> None:
    web.pages["/endless"] = web.endless(b"x" * 1000)
    head = reply(content_length=None, transfer_encoding="chunked")
    web.pages["/chunks"] = web.endless(b"3e8\r\n" + b"x" * 1000 + b"\r\n", head=head)
    web.pages["/declared"] = web.endless(b"x", 0.01, reply(content_length=str(MAX + 1)))
    for path in ("/endless", "/chunks", "/declared"):
        web.hung_up.clear()
        assert (await refusal(fetcher(web), url(web, path))).startswith("image_too_large")
        assert web.hung_up.wait(LONG)
    web.hung_up.clear()
    web.pages["/more"] = web.endless(b"x", 0.01, reply(PICTURE))
    assert await fetcher(web).fetch(url(web, "/more")) == PICTURE, "what comes beyond the declared size is not read"
    assert web.hung_up.wait(LONG)


async def test_a_slow_body_a_slow_head_and_silence_end_with_the_time(web: WebServer) -> None:
    web.pages["/drip"] = web.endless(b"x", 0.05)
    web.pages["/head"] = web.endless(b"x", 0.05, b"HTTP/1.1 200 OK\r\nx: ")
    web.pages["/silent"] = lambda wire: wire.recv(1)  # type: ignore[assignment,return-value]
    web.pages["/moved"] = redirect("/drip")
    for path in ("/drip", "/head", "/silent", "/moved"):
        async with asyncio.timeout(LONG):
            assert (await refusal(fetcher(web, seconds=0.2), url(web, path))).startswith("uri_unreachable")


BOMB = gzip.compress(b"\0" * (1 << 20))


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (reply(PICTURE, content_length=str(len(PICTURE) + 1)), "uri_unreachable"),
        (reply(PICTURE, content_length="-5"), "uri_unreachable"),
        (reply(b"0\r\n\r\n", transfer_encoding="chunked"), "uri_unreachable"),
        (reply(PICTURE, content_type=f"image/png\r\ncontent-length: {len(PICTURE) + 5}"), "uri_unreachable"),
        *((reply(BOMB, content_encoding=coding), "compressed") for coding in ("gzip", "br", "identity, gzip")),
        *((raw, "uri_unreachable") for raw in (b"", b"SSH-2.0-OpenSSH_9.6\r\n", b"\0" * 200)),
        (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 50_000, "uri_unreachable"),
    ],
    ids=range(11),
)
async def test_a_wrong_length_a_compressed_body_and_what_is_not_http_are_refused(
    web: WebServer, answer: bytes, told: str
) -> None:
    web.pages["/wrong"] = answer
    assert told in await refusal(fetcher(web), url(web, "/wrong"))


async def test_only_so_many_are_fetched_at_once(web: WebServer) -> None:
    pair, lock, now, most = threading.Barrier(2), threading.Lock(), 0, 0

    def together(wire: socket.socket) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        pair.wait(LONG)  # a third one would be counted before either of two is let go
        with lock:
            now -= 1
        wire.sendall(reply(PICTURE))

    web.pages["/pair"] = together
    made = fetcher(web, connections=2)
    assert await asyncio.gather(*(made.fetch(url(web, "/pair")) for _ in range(6))) == [PICTURE] * 6
    assert most == 2


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def secure(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    return context


@pytest.fixture(scope="module")
def trust(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


async def test_over_tls_name_and_certificate_stay_with_the_host_and_no_redirect_leads_out_of_it(
    web: WebServer, authority: trustme.CA, trust: ssl.SSLContext
) -> None:
    names: list[str | None] = []
    for issuer, name in ((authority, "cdn.test"), (authority, "other.test"), (trustme.CA(), "cdn.test")):
        context = secure(issuer, name)
        context.sni_callback = lambda wire, name, given: names.append(name)  # type: ignore[assignment]
        with web_server(tls=context) as safe:
            safe.pages |= {"/a.png": reply(PICTURE), "/moved": redirect(url(web))}
            made = fetcher(safe, places=[f"cdn.test:{safe.port}", f"cdn.test:{web.port}"], trust=trust)
            if (issuer, name) == (authority, "cdn.test"):
                assert await made.fetch(url(safe, scheme="https")) == PICTURE
                told = await refusal(made, url(safe, "/moved", scheme="https"))
                assert "redirects from https to http" in told and web.asked == []
            else:
                assert (await refusal(made, url(safe, scheme="https"))).startswith("uri_unreachable")
                assert safe.asked == []
    assert set(names) == {"cdn.test"}


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


def test_only_public_addresses_and_those_of_named_networks_are_allowed() -> None:
    assert [each for each in PUBLIC if not is_allowed(each)] == []
    assert [each for group in INSIDE.values() for each in group if is_allowed(each)] == []
    named = networks_of(["10.1.0.0/16", "fd00:1::/32", "192.0.2.7"])
    assert all(is_allowed(address, named) for address in ("10.1.2.3", "fd00:1::9", "192.0.2.7", "8.8.8.8"))
    others = ("10.2.0.1", "fd00:2::9", "192.0.2.8", "::ffff:a01:203")
    assert not any(is_allowed(address, named) for address in others)
    nat64 = networks_of(["64:ff9b::/96"])
    assert is_allowed("64:ff9b::808:808", nat64) and not is_allowed("64:ff9b::7f00:1", nat64)
    assert is_allowed("64:ff9b::a01:203", [*nat64, *networks_of(["10.1.0.0/16"])])


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
    def covered(url: str) -> bool:
        parts = urlsplit(url)
        return AllowRule.parse(rule).covers(parts.scheme, parts.hostname or "", parts.port, parts.path)

    assert [url for url in inside if not covered(url)] == []
    assert [url for url in outside if covered(url)] == []


def test_a_place_or_network_that_means_nothing_stops_the_start() -> None:
    for rule in ("", "file:///etc", "ftp://a.example", "user@a.example", "a.*.example", "*foo.example", "a b", "a?x"):
        with pytest.raises(ValidationError):
            Serve(image_hosts=[rule])
    with pytest.raises(ValidationError, match="host bits"):
        Serve(image_networks=["10.1.0.1/16"])
