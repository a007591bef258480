"""A server and a console behind an nginx: signing in by Keycloak, and access without a key from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import pytest

from core.addresses import free_port
from ops.console.request_context import MAX_NEXT
from tests.integration.serving.server_fixture import ServerFixture
from tests.outside.oidc.conftest import MakeRealm, csrf, groups, let_in_as, sign_in
from tests.support.console_server import console_server
from tests.support.nginx import BINARY, documented, nginx

pytestmark = [
    pytest.mark.oidc,
    pytest.mark.skipif(BINARY is None, reason="needs nginx: apt-get install nginx-light"),
]


LONG: Final = "/releases?a=" + "x" * (MAX_NEXT - 20)


@pytest.mark.proxy
@pytest.mark.parametrize(
    ("number", "next_page", "known"), [(0, LONG, True), (20, "/releases", True), (12, LONG, False)]
)
def test_somebody_signs_in_by_keycloak_under_a_path(
    make_realm: MakeRealm, visitor: httpx.Client, tmp_path: Path, number: int, next_page: str, known: bool
) -> None:
    """nginx allows 4 KB of response headers. If Keycloak's token does not fit into them together with the return page,
    signing out of the console does not end Keycloak's session by itself.
    """
    many = [f"a-group-with-a-long-name-{each}" for each in range(number)]
    port = free_port()
    url = f"https://127.0.0.1:{port}"
    realm = make_realm(
        {"operators": ["ann@example.com"]}, {"groups": [f"/{name}" for name in many]}, [groups()],
        groups=[{"name": name} for name in many], console_url=f"{url}/ratchet", prefix="/ratchet",
    )  # fmt: skip
    proxy = nginx(tmp_path, documented(":8001", realm.settings.console.port), port=port, tls=True)
    with console_server(realm.settings), proxy:
        page = sign_in(visitor, f"{url}/ratchet", next_page=next_page)
        assert page.status_code == 200 and page.url.path == "/ratchet/releases", page.text
        assert let_in_as(visitor, f"{url}/ratchet") == "operator"
        left = visitor.post(f"{url}/ratchet/sign-out", data={"csrf": csrf(page)})
        visitor.get(left.headers["refresh"].partition(";url=")[2])
        assert (realm.sessions() == []) is known and let_in_as(visitor, f"{url}/ratchet") == "nobody"


SERVER_PAGES: Final = ("/v1/models", "/metrics")
CONSOLE_PAGES: Final = ("/", "/releases", "/audit", "/quarantine", "/playground")
FAR: Final = "set_real_ip_from 127.0.0.1; real_ip_header X-Client; "
"""nginx takes the client's address from a header of the tests; without it, the address is one of this machine."""
OUTSIDER: Final = {"x-client": "198.51.100.7"}
SETUPS: Final = ("as installed", "as documented")


@dataclass
class Place:
    server: ServerFixture
    console: str


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    server = ServerFixture.make(tmp_path_factory.mktemp("server"), encoder_replicas=1)
    server.configure(console={"port": free_port()})
    try:
        server.start()
        with console_server(server.settings) as console:
            yield Place(server, console)
    finally:
        server.stop()


def location(setup: str, port: str, url: str) -> str:
    if setup == "as installed":
        return f"{FAR}location / {{ proxy_pass {url}; }}"
    real = int(url.rpartition(":")[2])
    return FAR + documented(port, real).replace("location /v1/", "location /").replace(
        "location /ratchet/", "location /"
    )


@pytest.mark.parametrize("setup", SETUPS)
def test_an_outsider_reads_nothing(setup: str, place: Place, tmp_path: Path) -> None:
    server, found = place.server, {}
    key = {"authorization": f"Bearer {server.settings.operator_key().get_secret_value()}"}
    with httpx.Client(headers=OUTSIDER, trust_env=False, timeout=60) as http:
        with nginx(tmp_path, location(setup, ":8000", server.url)) as url:
            for page in SERVER_PAGES:
                assert http.get(f"{server.url}{page}").status_code == 200, f"{page} is open on this machine"
                assert http.get(f"{url}{page}", headers=key).status_code == 200, page
                found[page] = http.get(f"{url}{page}").status_code
            words = {"model": "clip", "input": ["a red circle"]}
            assert http.post(f"{server.url}/v1/embeddings", json=words).status_code == 200
            found["/v1/embeddings"] = http.post(f"{url}/v1/embeddings", json=words).status_code
        with nginx(tmp_path, location(setup, ":8001", place.console)) as url:
            for page in CONSOLE_PAGES:
                assert http.get(f"{place.console}{page}").status_code == 200, f"{page} is open on this machine"
                answer = http.get(f"{url}{page}")
                found[f"console {page}"] = answer.headers.get("location", answer.status_code)
    outside = dict.fromkeys((*SERVER_PAGES, "/v1/embeddings"), 401)
    assert {page: str(seen).partition("?")[0] for page, seen in found.items()} == {
        **{page: str(status) for page, status in outside.items()},
        **{f"console {page}": "/sign-in" for page in CONSOLE_PAGES},
    }
