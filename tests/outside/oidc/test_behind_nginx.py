"""Signing in by Keycloak to a console behind an nginx that is set up as in docs/operator.md."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import httpx
import pytest

from core.addresses import free_port
from ops.console.request_context import MAX_NEXT
from tests.outside.oidc.conftest import MakeRealm, csrf, groups, let_in_as, sign_in
from tests.support.console_server import console_server
from tests.support.nginx import BINARY, documented, nginx

pytestmark = [
    pytest.mark.integration,
    pytest.mark.oidc,
    pytest.mark.proxy,
    pytest.mark.skipif(BINARY is None, reason="needs nginx: apt-get install nginx-light"),
]


LONG: Final = "/releases?a=" + "x" * (MAX_NEXT - 20)


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
