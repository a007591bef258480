"""Keycloak, started once, with a realm for each test, and visitors who sign in through its form."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from core.addresses import free_port
from core.settings import Settings
from tests.support.downloads import started
from tests.support.keycloak import Keycloak

PASSWORD: Final = "pass-word"
SECRET: Final = "client-secret"
ANN: Final[Mapping[str, Any]] = {
    "username": "ann", "email": "ann@example.com", "emailVerified": True, "firstName": "Ann", "lastName": "Lee",
    "enabled": True, "groups": ["/ml-platform"], "credentials": [{"type": "password", "value": PASSWORD}],
}  # fmt: skip
SECONDS: Final = 60.0


@pytest.fixture(scope="session")
def keycloak() -> Iterator[Keycloak]:
    with started("Keycloak", Keycloak) as found:
        yield found


def mapper(name: str, kind: str, claim: str, **config: str) -> dict[str, Any]:
    """A protocol mapper of a client; its claims are in all tokens and in userinfo, unless ``config`` says otherwise."""
    where = {f"{place}.token.claim": "true" for place in ("id", "access", "userinfo")}
    return {
        "name": name, "protocol": "openid-connect", "protocolMapper": f"oidc-{kind}-mapper",
        "config": where | {"claim.name": claim} | config,
    }  # fmt: skip


def groups(full_path: str = "false", **config: str) -> dict[str, Any]:
    return mapper("groups", "group-membership", "groups", **{"full.path": full_path, **config})


@dataclass(frozen=True)
class Realm:
    """A realm of Keycloak with the user ann and the console as a client, and settings of that console."""

    keycloak: Keycloak
    name: str
    settings: Settings

    @property
    def path(self) -> str:
        return f"/{self.name}"

    def sessions(self) -> list[Any]:
        (user,) = self.keycloak.admin("GET", f"{self.path}/users")
        found: list[Any] = self.keycloak.admin("GET", f"{self.path}/users/{user['id']}/sessions")
        return found

    def leave_out_email_verified(self) -> None:
        """Delete the mapper of the scope ``email``, as Entra ID lacks that claim."""
        scopes = self.keycloak.admin("GET", f"{self.path}/client-scopes")
        (email,) = (each for each in scopes if each["name"] == "email")
        (found,) = (each for each in email["protocolMappers"] if each["name"] == "email verified")
        self.keycloak.admin("DELETE", f"{self.path}/client-scopes/{email['id']}/protocol-mappers/models/{found['id']}")


MakeRealm = Callable[..., Realm]


@pytest.fixture
def make_realm(keycloak: Keycloak, tmp_path: Path) -> MakeRealm:
    """A function that makes a realm, and the settings of a console on loopback where pages need a key."""

    def make(
        rules: Mapping[str, Any], user: Mapping[str, Any] | None = None, mappers: Sequence[dict[str, Any]] = (),
        groups: Sequence[dict[str, Any]] = ({"name": "ml-platform"},), console_url: str = "", prefix: str = "",
    ) -> Realm:  # fmt: skip
        port, name = free_port(), f"realm-{free_port()}"
        url = console_url or f"http://127.0.0.1:{port}"
        client = {
            "clientId": "ratchet", "secret": SECRET, "redirectUris": [f"{url}/sign-in/oidc/done"],
            "directAccessGrantsEnabled": True, "protocolMappers": list(mappers),
        }  # fmt: skip
        people = [{**ANN, **(user or {})}]
        keycloak.admin("POST", "", {"realm": name, "enabled": True, "groups": list(groups), "users": people,
                                    "clients": [client]})  # fmt: skip
        oidc = {"issuer": keycloak.issuer(name), "client_id": "ratchet", "client_secret": SECRET, "console_url": url}
        settings = Settings.model_validate({
            "home": tmp_path, "base": {"vlm": ""}, "serve": {"port": 1}, "access": {"require_keys": "always"},
            "console": {"port": port, "path_prefix": prefix, "oidc": oidc | dict(rules)},
        })  # fmt: skip
        return Realm(keycloak, name, settings)

    return make


@pytest.fixture
def visitor() -> Iterator[httpx.Client]:
    """Follows redirects and sends cookies as browsers do: on loopback also Secure ones without TLS."""

    def secure_enough(_: httpx.Response) -> None:
        for cookie in client.cookies.jar:
            cookie.secure = False

    hooks = {"response": [secure_enough]}
    with httpx.Client(
        event_hooks=hooks, follow_redirects=True, verify=False, trust_env=False, timeout=SECONDS
    ) as client:
        yield client


def sign_in(visitor: httpx.Client, console: str, name: str = "ann", next_page: str = "/") -> httpx.Response:
    form = visitor.get(f"{console}/sign-in/oidc", params={"next": next_page})
    assert form.is_success and 'id="kc-form-login"' in form.text, form.text
    action = html.unescape(re.findall(r'<form[^>]* action="([^"]+)"', form.text)[0])
    return visitor.post(action, data={"username": name, "password": PASSWORD})


def let_in_as(visitor: httpx.Client, console: str) -> str:
    """The rights that the console gives this visitor: ``operator``, ``reader`` or ``nobody``."""
    seen = visitor.get(f"{console}/releases/hold")
    if seen.status_code == 200 and "/sign-in" not in seen.url.path:
        return "operator"
    looked = visitor.get(f"{console}/audit")
    return "reader" if seen.status_code == 403 and "/sign-in" not in looked.url.path else "nobody"


def csrf(page: httpx.Response) -> str:
    return str(re.findall(r'"x-csrf-token": "([^"]+)"', page.text)[0])
