"""The console behind a real nginx, as in docs/operator/access.md: TLS termination, a path, and large pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from core.addresses import free_port
from core.settings import Settings
from tests.support.console_server import console_server
from tests.support.nginx import BINARY, documented, nginx
from tests.unit.ops.console.test_security import links

pytestmark = [
    pytest.mark.proxy,
    pytest.mark.skipif(BINARY is None, reason="needs nginx: apt-get install nginx-light"),
]


@pytest.fixture(params=["loopback", "world"])
def console(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Settings, int]]:
    port, host = free_port(), "127.0.0.1" if request.param == "loopback" else "0.0.0.0"
    own = {"port": port, "host": host, "path_prefix": "/ratchet"}
    settings = Settings.model_validate({"home": tmp_path, "base": {"vlm": ""}, "serve": {"port": 1}, "console": own})
    with console_server(settings):
        yield settings, port


@pytest.fixture
def proxy(console: tuple[Settings, int], tmp_path: Path) -> Iterator[str]:
    """Its URL. It connects from an address other than 127.0.0.1, like one on another machine."""
    with nginx(tmp_path, f"proxy_bind 127.0.0.9;\n{documented(':8001', console[1])}", tls=True) as url:
        yield url


def test_a_visitor_signs_in_and_uses_it(console: tuple[Settings, int], proxy: str) -> None:
    key = console[0].operator_key().get_secret_value()
    with httpx.Client(base_url=proxy, verify=False, trust_env=False) as client:
        assert client.get("/ratchet/audit").headers["location"] == "/ratchet/sign-in?next=%2Faudit"
        form = client.get("/ratchet/sign-in").text
        assert "not encrypted" not in form
        token = re.findall(r'"x-csrf-token": "([^"]+)"', form)[0]
        answer = client.post("/ratchet/sign-in", data={"key": key, "csrf": token, "next": "/audit"})
        assert answer.status_code == 303 and "Secure" in answer.headers["set-cookie"]
        page = client.get(answer.headers["location"])
        assert page.status_code == 200
        for link in {each for each in links(page.text) if "/static/" in each}:
            assert client.get(link).status_code == 200, link
        token = re.findall(r'"x-csrf-token": "([^"]+)"', page.text)[0]
        picture = {"picture": ("big.png", bytes(5 << 20), "image/png")}
        assert client.post("/ratchet/playground/similar", data={"csrf": token}, files=picture).status_code != 413
