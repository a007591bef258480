"""The console behind a proxy: TLS that ends there, another name, and a path."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pydantic import ValidationError

from core.settings import Settings
from tests.unit.console.test_security import FAR, LOCAL, from_afar, visitor

TLS = {"x-forwarded-proto": "https"}
PREFIXED = {"host": "0.0.0.0", "path_prefix": "/tools/ratchet"}


class Links(HTMLParser):
    """Everything in a page that a browser asks for."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = ("href", "src", "action", "formaction", "hx-get", "hx-post")
        self.found += [value for name, value in attrs if name in names and value and value.startswith("/")]


def test_tls_that_ends_at_a_proxy_is_no_missing_tls(tmp_path: Path) -> None:
    client = visitor(tmp_path, FAR.replace("https", "http"), console={"host": "0.0.0.0"})
    plain = client.get("/sign-in").text
    assert "not encrypted" in plain and "X-Forwarded-Proto" in plain
    assert "not encrypted" not in client.get("/sign-in", headers=TLS).text


def test_a_name_that_is_not_this_machine_s_is_refused_with_the_setting_that_allows_it(tmp_path: Path) -> None:
    answer = visitor(tmp_path).get("/", headers={"host": "console.example"})
    assert answer.status_code == 421 and "'console.example'" in answer.text and "serve.allowed_hosts" in answer.text
    for name in ("localhost:8001", "127.0.0.1", "[::1]:8001"):
        assert visitor(tmp_path).get("/sign-in", headers={"host": name}).status_code == 200
    assert from_afar(tmp_path).get("/sign-in").status_code == 200, "it listens to the world"
    named = visitor(tmp_path, serve={"port": 1, "allowed_hosts": ["console.example"]})
    assert named.get("/sign-in", headers={"host": "console.example", **TLS}).status_code == 200
    assert named.get("/sign-in", headers={"host": "other.example"}).status_code == 421


def test_a_cookie_that_came_by_tls_goes_by_tls_alone_also_from_loopback(tmp_path: Path) -> None:
    for headers, secure in ((TLS, True), ({}, False)):
        cookie = visitor(tmp_path, LOCAL).get("/sign-in", headers=headers).headers["set-cookie"]
        assert ("Secure" in cookie) is secure


@pytest.mark.parametrize("stripped", [True, False])
def test_under_a_path_of_a_proxy_every_link_stays_there(tmp_path: Path, stripped: bool) -> None:
    prefix = PREFIXED["path_prefix"]
    before = "" if stripped else prefix  # proxies may take the path away, or leave it
    client = visitor(tmp_path, FAR, console=PREFIXED)
    away = client.get(f"{before}/releases?limit=5")
    assert away.status_code == 303 and away.headers["location"] == f"{prefix}/sign-in?next=%2Freleases%3Flimit%3D5"
    form = client.get(f"{before}/sign-in?next=/releases").text
    token = re.findall(r'"x-csrf-token": "([^"]+)"', form)[0]
    key = Settings(home=tmp_path).operator_key().get_secret_value()
    arrived = client.post(f"{before}/sign-in", data={"key": key, "csrf": token, "next": "/releases"})
    assert arrived.status_code == 303 and arrived.headers["location"] == f"{prefix}/releases"
    for page in ("/", "/releases", "/playground", "/audit", "/quarantine", "/nowhere"):
        answer = client.get(before + page)
        links = Links(answer.text).found
        assert len(links) > 5 and all(link.startswith(f"{prefix}/") for link in links), page
        assert int(answer.headers["content-length"]) == len(answer.content)
    assert client.get(f"{before}/static/console.css").status_code == 200
    moved = {"hx-request": "true", "hx-current-url": f"{FAR}{prefix}/releases?limit=5"}
    client.cookies.clear()
    back = client.get(f"{before}/overview/now", headers=moved).headers["hx-redirect"]
    assert back == f"{prefix}/sign-in?next=%2Freleases%3Flimit%3D5"


@pytest.mark.parametrize("wrong", ["ratchet", "/ratchet/", "//evil.example", "/a b", '/"'])
def test_a_path_that_is_none_is_an_error_of_the_settings(wrong: str) -> None:
    with pytest.raises(ValidationError):
        Settings(console={"path_prefix": wrong})
