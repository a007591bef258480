"""Only what the operator listed is fetched."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from core.errors import RecordError
from core.settings.streams import Ingest
from streams.records.uris import UriFetcher

LOOPBACK = ["127.0.0.1/32"]


def fetch(uri: str, allowed: Sequence[str], max_bytes: int, networks: Sequence[str] = ()) -> bytes:
    """What a fetcher with these limits gets."""
    limits = {**Ingest().model_dump(), "allowed_uris": allowed, "allowed_networks": networks}
    fetcher = UriFetcher(Ingest.model_construct(**{**limits, "max_image_bytes": max_bytes}))  # smaller than is valid
    try:
        return fetcher.fetch(uri)
    finally:
        fetcher.close()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/images/moved":
            self.send_response(302)
            self.send_header("Location", "/secret")
        else:
            self.send_response(200 if self.path in ("/images/a", "/secret") else 404)
        self.end_headers()
        self.wfile.write(self.path.encode() * 10)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def site_url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def reason(uri: str, *allowed: str, max_bytes: int = 1000) -> str:
    with pytest.raises(RecordError) as caught:
        fetch(uri, allowed, max_bytes, LOOPBACK)
    return str(caught.value.reason)


def test_what_lies_under_a_listed_address_is_fetched(site_url: str) -> None:
    for prefix in (f"{site_url}/images/", f"{site_url}/images", f"{site_url}/images/a", site_url):
        assert fetch(f"{site_url}/images/a", ["file:///nowhere", prefix], 1000, LOOPBACK) == b"/images/a" * 10


def test_an_address_inside_is_refused_unless_its_network_is_named(site_url: str) -> None:
    with pytest.raises(RecordError, match=r"not public.*ingest\.allowed_networks"):
        fetch(f"{site_url}/images/a", [site_url], 1000)


def test_other_addresses_are_not(site_url: str) -> None:
    allowed = f"{site_url}/images"
    outside = ["/secret", "/imagesque", "/images/../secret", "/images/%2e%2e/secret", "/images/..%5csecret"]
    assert {reason(site_url + path, allowed) for path in outside} == {"uri_not_allowed"}
    port = site_url.rpartition(":")[2]
    others = [
        f"https://127.0.0.1:{port}/images/a",
        f"http://localhost:{port}/images/a",
        "http://127.0.0.1:1/images/a",
        f"http://127.0.0.1:{port}@evil.example/images/a",
        f"http://user@127.0.0.1:{port}/images/a",
        "http://127.0.0.1:no/images/a",
        "ftp://127.0.0.1/images/a",
        "images/a",
        "http://[::1/images/a",
        "",
    ]
    assert {reason(uri, allowed) for uri in others} == {"uri_not_allowed"}
    assert reason(f"{site_url}/images/a") == "uri_not_allowed"


def test_redirects_stay_in_the_list(site_url: str) -> None:
    assert fetch(f"{site_url}/images/moved", [site_url], 1000, LOOPBACK) == b"/secret" * 10
    assert reason(f"{site_url}/images/moved", f"{site_url}/images") == "uri_not_allowed"


def test_files_stay_inside_their_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "in-secret"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "a b.png").write_bytes(b"12345")
    (inside / "link").symlink_to(outside / "a b.png")
    allowed = f"file://{inside}"
    assert fetch(f"file://{inside}/a%20b.png", [allowed], 5) == b"12345"
    assert reason(f"file://{inside}/a%20b.png", allowed, max_bytes=4) == "image_too_large"
    assert reason(f"file://{outside}/a%20b.png", allowed) == "uri_not_allowed"
    assert reason(f"file://{inside}/link", allowed) == "uri_not_allowed"
    assert reason(f"file://{inside}/%2e%2e/in-secret/a%20b.png", allowed) == "uri_not_allowed"
    assert reason(f"file://host{inside}/a%20b.png", allowed) == "uri_not_allowed"
    assert reason(f"file://{inside}/none.png", allowed) == "uri_unreachable"
    assert reason(f"file://{inside}", allowed) == "uri_unreachable"
    assert reason("file:///dev/zero", "file:///dev") == "uri_unreachable"
