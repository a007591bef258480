"""The role that the console gives a user, depending on what Keycloak says of them; and how they leave again."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import httpx
import pytest
import yaml
from playwright.sync_api import expect

from core.ledger import Ledger
from tests.outside.oidc.conftest import PASSWORD, SECRET, MakeRealm, csrf, groups, let_in_as, mapper, sign_in
from tests.support.browser import chromium
from tests.support.browser import console as console_process
from tests.support.console_server import console_server

pytestmark = pytest.mark.oidc
NAMED: Final = {"operators": ["ann@example.com"]}
GROUP: Final = {"operator_groups": ["ml-platform"], "readers": ["*"]}
BY_NAME: Final = {"name_claim": "preferred_username"}
NOT_VERIFIED: Final = "the provider does not say that it verified the address 'ann@example.com'"


@dataclass(frozen=True)
class Case:
    """What Keycloak is told about ann (by default her address is verified and she is in ml-platform), the console's
    settings, and the result: a role, or words of the page that turns her away.
    """

    rules: Mapping[str, Any]
    outcome: str
    user: Mapping[str, Any] = field(default_factory=dict)
    mappers: Sequence[dict[str, Any]] = ()
    groups: Sequence[dict[str, Any]] = ({"name": "ml-platform"},)
    email_verified: Literal["as it is", "absent", "the string false"] = "as it is"


CASES: Final = {
    "verified": Case(NAMED, "operator"),
    "not verified": Case(NAMED, NOT_VERIFIED, {"emailVerified": False}),
    "not verified, everyone reads": Case({"readers": ["*"]}, NOT_VERIFIED, {"emailVerified": False}),
    "verified says the string false": Case(NAMED, NOT_VERIFIED, email_verified="the string false"),
    "verified absent": Case(NAMED, NOT_VERIFIED, email_verified="absent"),
    "verified absent, trusted": Case({**NAMED, "trust_emails": True}, "operator", email_verified="absent"),
    "named like the group": Case({**GROUP, **BY_NAME}, "reader", {"username": "ml-platform", "groups": []},
                                 [groups()]),
    "in a group named like an operator": Case(
        {"operators": ["boss"], "readers": ["*"], **BY_NAME}, "reader", {"groups": ["/boss"]}, [groups()],
        [{"name": "boss"}],
    ),
    "no mapper": Case({"operator_groups": ["ml-platform"]}, "Groups that the provider sent: none"),
    "no mapper, everyone reads": Case(GROUP, "reader"),
    "full path": Case({"operator_groups": ["ml-platform"]}, "Groups that the provider sent: /ml-platform",
                      mappers=[groups(full_path="true")]),
    "full path in the settings": Case({"operator_groups": ["/ml-platform"]}, "operator",
                                      mappers=[groups(full_path="true")]),
    "without the path": Case(GROUP, "operator", mappers=[groups()]),
    "groups in userinfo alone": Case(
        GROUP, "operator", mappers=[groups(**{"id.token.claim": "false", "access.token.claim": "false"})]
    ),
    "subgroup of the same name, without the path": Case(
        GROUP, "operator", {"groups": ["/guests/ml-platform"]}, [groups()],
        [{"name": "ml-platform"}, {"name": "guests", "subGroups": [{"name": "ml-platform"}]}],
    ),
    "subgroup of the same name, with the path": Case(
        {**GROUP, "operator_groups": ["/ml-platform"]}, "reader", {"groups": ["/guests/ml-platform"]},
        [groups(full_path="true")],
        [{"name": "ml-platform"}, {"name": "guests", "subGroups": [{"name": "ml-platform"}]}],
    ),
}  # fmt: skip
STRING_FALSE: Final = mapper(
    "verified", "hardcoded-claim", "email_verified", **{"claim.value": "false", "jsonType.label": "String"}
)


@pytest.mark.parametrize("name", CASES)
def test_as_what_somebody_is_let_in(name: str, make_realm: MakeRealm, visitor: httpx.Client) -> None:
    case = CASES[name]
    mappers = [*case.mappers, STRING_FALSE] if case.email_verified == "the string false" else case.mappers
    realm = make_realm(case.rules, case.user, mappers, case.groups)
    if case.email_verified != "as it is":
        realm.leave_out_email_verified()
    with console_server(realm.settings) as console:
        assert let_in_as(visitor, console) == "nobody"
        answer = sign_in(visitor, console, case.user.get("username", "ann"))
        role = let_in_as(visitor, console)
    keys = Ledger.open(realm.settings.ledger).api_keys(ended=True)
    if case.outcome in ("operator", "reader"):
        assert (answer.status_code, role) == (200, case.outcome)
        assert ("operate" in keys[0].scopes) is (role == "operator")
    else:
        assert answer.status_code == 403 and case.outcome in html.unescape(answer.text), answer.text
        assert (role, keys) == ("nobody", [])


def test_who_takes_the_address_of_an_operator_is_turned_away(make_realm: MakeRealm, visitor: httpx.Client) -> None:
    """Keycloak lets users change their address, and then says that it is not verified."""
    roles = {"account": ["manage-account", "view-profile"]}
    realm = make_realm(NAMED, {"username": "eve", "email": "eve@example.com", "clientRoles": roles})
    issuer = realm.settings.console.oidc.issuer
    grant = {"grant_type": "password", "client_id": "ratchet", "client_secret": SECRET, "username": "eve"}
    given = visitor.post(f"{issuer}/protocol/openid-connect/token", data={**grant, "password": PASSWORD}).json()
    as_eve = {"authorization": f"Bearer {given['access_token']}", "accept": "application/json"}
    account = visitor.get(f"{issuer}/account", headers=as_eve).json()
    changed = visitor.post(f"{issuer}/account", headers=as_eve, json={**account, "email": "ann@example.com"})
    assert changed.is_success, changed.text
    with console_server(realm.settings) as console:
        answer = sign_in(visitor, console, "eve")
        assert answer.status_code == 403 and NOT_VERIFIED in html.unescape(answer.text)
        assert let_in_as(visitor, console) == "nobody"


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"client_secret": "another"}, "console.oidc.client_id, its secret"),
        ({"scope": "openid email nonsense"}, "scope"),
        ({"scope": "email"}, "console.oidc.scope, which has to name openid"),
    ],
)
def test_an_error_of_the_settings_is_named_to_whom_can_correct_it(
    make_realm: MakeRealm, visitor: httpx.Client, rules: dict[str, str], words: str
) -> None:
    realm = make_realm({**NAMED, **rules})
    with console_server(realm.settings) as console:
        if "nonsense" in rules.get("scope", ""):  # Keycloak sends the browser back at once
            answer = visitor.get(f"{console}/sign-in/oidc")
        else:
            answer = sign_in(visitor, console)
    text = html.unescape(answer.text)
    assert answer.status_code == 401 and words in text and "An operator of Ratchet has to correct" in text, text
    assert "Sign in again" not in text


@pytest.mark.parametrize("page", ["/releases?a=" + "x" * 5000, "/releases?a=" + "ж" * 300, "/releases?a=" + "x" * 900])
def test_a_long_way_back_breaks_no_sign_in(make_realm: MakeRealm, visitor: httpx.Client, page: str) -> None:
    realm = make_realm(NAMED)
    with console_server(realm.settings) as console:
        answer = sign_in(visitor, console, next_page=page)
        kept = len(page) < 1000 and page.isascii()
        assert answer.status_code == 200 and answer.url.path == ("/releases" if kept else "/")
        assert let_in_as(visitor, console) == "operator"


def test_a_browser_signs_in_and_out(make_realm: MakeRealm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two sites, as `ratchet console` is run: with a settings file, and the secret in the environment."""
    realm = make_realm(NAMED)
    found = realm.settings.model_dump(mode="json", exclude_unset=True)
    del found["console"]["oidc"]["client_secret"]
    config = tmp_path / "ratchet.yaml"
    config.write_text(yaml.safe_dump(found))
    monkeypatch.setenv("RATCHET_CONSOLE__OIDC__CLIENT_SECRET", SECRET)
    url = realm.settings.console.oidc.console_url
    with console_process(config, url, tmp_path / "console.log"), chromium() as browser:
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.goto(f"{url}/audit?about=x")
        page.get_by_role("link", name="Sign in by localhost").click()
        page.locator("#username").fill("ann")
        page.locator("#password").fill(PASSWORD)
        page.locator("#kc-login").click()
        page.wait_for_url(f"{url}/audit?about=x")
        expect(page.get_by_text("ann@example.com").first).to_be_visible()
        assert len(realm.sessions()) == 1
        page.get_by_role("button", name="Sign out").click()
        page.wait_for_url(f"{realm.keycloak.url}/**")
        expect(page.get_by_role("heading", name="You are logged out")).to_be_visible()
        assert realm.sessions() == [] and Ledger.open(realm.settings.ledger).api_keys() == []
        page.goto(f"{url}/sign-in/oidc")
        expect(page.locator("#kc-login")).to_be_visible()


def test_where_the_token_is_too_long_for_the_cookie_keycloak_asks(make_realm: MakeRealm, visitor: httpx.Client) -> None:
    many = [f"a-group-with-a-long-name-{number}" for number in range(60)]
    realm = make_realm(
        NAMED, {"groups": [f"/{name}" for name in many]}, [groups()], groups=[{"name": name} for name in many]
    )
    with console_server(realm.settings) as console_url:
        page = sign_in(visitor, console_url)
        assert page.status_code == 200 and let_in_as(visitor, console_url) == "operator"
        left = visitor.post(f"{console_url}/sign-out", data={"csrf": csrf(page)})
        assert let_in_as(visitor, console_url) == "nobody" and len(realm.sessions()) == 1
        asked = visitor.get(left.headers["refresh"].partition(";url=")[2])
        action = html.unescape(re.findall(r'<form[^>]* action="([^"]+)"', asked.text)[0])
        code = re.findall(r'name="session_code" value="([^"]*)"', asked.text)
        visitor.post(asked.url.join(action), data={"session_code": code, "confirmLogout": "Logout"})
        assert realm.sessions() == []
