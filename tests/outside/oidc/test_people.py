"""The role that the console gives a user, depending on what Keycloak says of them."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import httpx
import pytest

from core.ledger import Ledger
from tests.outside.oidc.conftest import PASSWORD, SECRET, MakeRealm, groups, let_in_as, mapper, sign_in
from tests.support.console_server import console_server

pytestmark = [pytest.mark.integration, pytest.mark.oidc]
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


def test_a_user_who_takes_the_address_of_an_operator_is_turned_away(
    make_realm: MakeRealm, visitor: httpx.Client
) -> None:
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
