"""Signing in through an identity provider, over real HTTP."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import oidc_provider_mock
import pytest
from authlib.integrations.base_client.errors import OAuthError
from authlib.integrations.starlette_client import StarletteOAuth2App
from fastapi.testclient import TestClient
from pydantic import ValidationError

from core.errors import AccessError, LedgerUnavailable
from core.ledger import Ledger
from core.settings import Settings
from core.settings.identity import Oidc
from ops.console.pages.sign_in import READ, scopes_of
from tests.unit.ops.console.conftest import FAR, csrf, visit

RULES: dict[str, Any] = {
    "client_id": "ratchet", "client_secret": "s3cret", "console_url": FAR, "reader_groups": ["team"],
    "operator_groups": ["platform"],
}  # fmt: skip
UNVERIFIED = (False, None, "false", "true", 1)
LONG = "/releases?a=" + "x" * 980

pytestmark = pytest.mark.usefixtures("at_once")


@pytest.fixture(scope="module")
def issuer() -> Iterator[str]:
    with oidc_provider_mock.run_server_in_thread() as server:
        yield f"http://localhost:{server.server_port}"


@dataclass
class SignIn:
    """A home, its ledger and a provider."""

    home: Path
    ledger: Ledger
    issuer: str

    def console(self, **rules: Any) -> TestClient:
        return visit(self.home, FAR, console={"host": "0.0.0.0", "oidc": {"issuer": self.issuer, **RULES, **rules}})

    def someone(self, name: str, **claims: Any) -> None:
        facts = {"email": f"{name}@example.com", "email_verified": True, **claims}
        httpx.put(f"{self.issuer}/users/{name}", json=facts).raise_for_status()

    def member(self, **claims: Any) -> TestClient:
        self.someone("ann", groups=["team"], **claims)
        return self.console()

    def way_back(self, client: TestClient, name: str = "ann", next_page: str = "/") -> str:
        """Go to the provider and sign in there. Returns the URL that it redirects to."""
        away = client.get("/sign-in/oidc", params={"next": next_page})
        assert away.status_code == 302 and away.headers["location"].startswith(self.issuer)
        query = parse_qs(urlsplit(away.headers["location"]).query)
        assert query["code_challenge_method"] == ["S256"] and query["nonce"]
        assert query["redirect_uri"] == [f"{FAR}/sign-in/oidc/done"]
        sent = httpx.post(away.headers["location"], data={"sub": name})
        assert sent.status_code == 302, sent.text
        return sent.headers["location"]

    def leave(self, client: TestClient) -> httpx.Response:
        return client.post("/sign-out", data={"csrf": csrf(client, "/releases")})


@pytest.fixture
def sso(tmp_path: Path, ledger: Ledger, issuer: str) -> SignIn:
    return SignIn(tmp_path, ledger, issuer)


def test_members_of_a_group_may_look_and_those_of_another_act(sso: SignIn) -> None:
    sso.someone("ann", groups=["staff", "team"])
    sso.someone("Zoë O'Hara", email="Zoë.O'Hara@example.com", groups="platform")
    for name, scopes, key_name, groups in (
        ("ann", ("infer", "search"), "ann@example.com.", ["staff", "team"]),
        ("Zoë O'Hara", ("infer", "search", "publish", "operate"), "zo-.o-hara@example.com.", ["platform"]),
    ):
        client = sso.console()
        assert sso.issuer.removeprefix("http://").split(":")[0] in client.get("/sign-in").text
        arrived = client.get(sso.way_back(client, name, "/releases"))
        assert arrived.status_code == 303 and arrived.headers["location"] == "/releases"
        assert client.get("/releases").status_code == 200
        row, signed = sso.ledger.api_keys()[0], sso.ledger.audit_rows(1)[0]
        assert row.scopes == list(scopes) and row.name.startswith(key_name) and row.expires_at is not None
        assert (signed.actor, signed.action) == (f"key:{row.name}", "sign in")
        told = (signed.detail["issuer"], signed.detail["subject"], signed.detail["groups"])
        assert told == (sso.issuer, name, groups)
        if name == "ann":
            answer = client.post("/releases/hold", data={"csrf": csrf(client, "/releases"), "reason": "x"})
            assert answer.status_code == 403 and "audit log" in answer.text and "console.oidc" in answer.text


def test_signing_out_ends_the_key_and_the_session_of_the_provider(sso: SignIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a page: browsers allow no form that redirects to another site. A key that somebody made stays."""
    client = sso.member()
    client.get(sso.way_back(client))
    assert len(sso.ledger.api_keys()) == 1
    answer = sso.leave(client)
    seconds, _, url = answer.headers["refresh"].partition(";url=")
    query = parse_qs(urlsplit(url).query)
    assert answer.status_code == 200 and seconds == "0" and url.startswith(f"{sso.issuer}/oauth2/end_session?")
    assert query["client_id"] == ["ratchet"] and query["id_token_hint"][0].count(".") == 2
    assert "Signed in as" not in answer.text and html.escape(url) in answer.text
    assert sso.ledger.api_keys() == [] and client.get("/releases").status_code == 303

    client.get(sso.way_back(client))
    with monkeypatch.context() as patch:
        patch.delitem(client.app.state.provider.server_metadata, "end_session_endpoint")  # type: ignore[attr-defined]
        answer = sso.leave(client)
    assert answer.status_code == 303 and answer.headers["location"] == "/", "a provider without it"

    _, token = sso.ledger.create_key("bob", ["search"], actor="t")
    client.post("/sign-in", data={"key": token, "csrf": csrf(client)})
    assert sso.leave(client).status_code == 303
    assert [row.name for row in sso.ledger.api_keys()] == ["bob"]

    def away(*_: Any, **__: Any) -> None:
        raise LedgerUnavailable("no route to host")

    client.get(sso.way_back(client))
    form = {"csrf": csrf(client, "/releases")}
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "revoke_key", away)
        assert client.post("/sign-out", data=form).status_code == 200
    assert client.get("/releases").status_code == 303, "the browser has no key any more"


@pytest.mark.parametrize(("characters", "next_page"), [(1, "/"), (1, LONG), (1300, LONG), (4000, "/")])
def test_a_proxy_with_room_for_4_kb_of_headers_passes_each_answer_of_a_sign_in_on(
    sso: SignIn, characters: int, next_page: str
) -> None:
    """The default of nginx, which answers 502 otherwise. A token that is too large for the cookie is not kept."""
    client = sso.member(note="x" * characters)
    away = client.get("/sign-in/oidc", params={"next": next_page})
    arrived = client.get(sso.way_back(client, "ann", next_page))
    assert arrived.status_code == 303 and arrived.headers["location"] == next_page
    assert client.get("/releases").status_code == 200
    for answer in (away, arrived):
        assert sum(len(name) + len(value) + 4 for name, value in answer.headers.raw) < 4000
    left = sso.leave(client).headers["refresh"]
    assert "client_id=ratchet" in left and ("id_token_hint" in left or characters > 1)
    assert "id_token_hint" not in left or characters < 4000


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ({"groups": ["others", "x"]}, "may not use this console. Groups that the provider sent: others, x."),
        *(({"email_verified": value, "groups": ["team"]}, "not say that it verified") for value in UNVERIFIED),
        ({"email": "", "groups": ["team"]}, "no claim"), ({"groups": {"team": 1}}, "sent: none"),
    ],
)  # fmt: skip
def test_who_is_not_named_gets_no_key(sso: SignIn, claims: dict[str, Any], words: str) -> None:
    sso.someone("eve", **claims)
    client = sso.console()
    answer = client.get(sso.way_back(client, "eve"))
    assert answer.status_code == 403 and words in answer.text
    assert sso.ledger.api_keys(ended=True) == [] and client.get("/releases").status_code == 303


def test_a_code_is_taken_from_the_issuer_in_the_browser_that_asked_and_once(sso: SignIn) -> None:
    client, other = sso.member(), sso.console()
    back = sso.way_back(client)
    other.get("/sign-in/oidc")
    for stranger in (other, sso.console()):
        answer = stranger.get(back)
        assert answer.status_code == 401 and "did not work" in answer.text
    assert [client.get(back).status_code for _ in range(2)] == [303, 401]
    assert len(sso.ledger.api_keys()) == 1
    client = sso.console()
    back = sso.way_back(client)
    another = {"issuer": sso.issuer.replace("localhost", "127.0.0.1"), **RULES}
    client.app.state.data.settings = Settings(home=sso.home, console={"host": "0.0.0.0", "oidc": another})  # type: ignore[attr-defined]
    answer = client.get(back)
    assert answer.status_code == 401 and sso.issuer in answer.text and "console.oidc.issuer" in answer.text
    assert len(sso.ledger.api_keys()) == 1


def test_a_provider_that_is_away_or_no_provider_is_said_so(sso: SignIn) -> None:
    for address in ("http://localhost:1", f"{sso.issuer}/nowhere"):
        answer = sso.console(issuer=address).get("/sign-in/oidc")
        assert answer.status_code == 503 and "API key" in answer.text
        assert ("Try again" in answer.text) is ("nowhere" not in address), "trying again changes no setting"
    without = visit(sso.home)
    assert without.get("/sign-in/oidc").status_code == 404 and "/sign-in/oidc" not in without.get("/sign-in").text


def test_an_error_of_the_settings_does_not_ask_to_try_again(sso: SignIn, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, again in (("invalid_client", False), ("invalid_scope", False), ("invalid_grant", True)):

        async def fails(*_: Any, error: str = error, **__: Any) -> None:
            raise OAuthError(error, "the provider's words")

        client = sso.member()
        back = sso.way_back(client)
        monkeypatch.setattr(StarletteOAuth2App, "fetch_access_token", fails)
        answer = client.get(back)
        assert answer.status_code == 401 and error in answer.text
        assert ("Sign in again" in answer.text) is again
        assert ("console.oidc.client_id" in answer.text) is not again


@pytest.fixture
def thin_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider whose tokens only identify the user; the other claims are in userinfo."""
    whole = StarletteOAuth2App.parse_id_token

    async def thin(self: StarletteOAuth2App, *args: Any, **options: Any) -> dict[str, Any]:
        claims = await whole(self, *args, **options)
        return {name: value for name, value in claims.items() if name not in ("groups", "email_verified")}

    monkeypatch.setattr(StarletteOAuth2App, "parse_id_token", thin)


@pytest.mark.usefixtures("thin_tokens")
def test_userinfo_counts_and_without_it_what_the_token_says(sso: SignIn) -> None:
    sso.someone("ann", groups=["/platform", "platform"])
    client = sso.console(readers=["*"])
    assert client.get(sso.way_back(client)).status_code == 303
    assert "operate" in sso.ledger.api_keys()[0].scopes
    assert sso.ledger.audit_rows(1)[0].detail["groups"] == ["/platform", "platform"]
    client = sso.console(readers=["*"], trust_emails=True)
    back = sso.way_back(client)
    client.app.state.provider.server_metadata["userinfo_endpoint"] = f"{sso.issuer}/nowhere"  # type: ignore[attr-defined]
    assert client.get(back).status_code == 303
    assert "operate" not in sso.ledger.api_keys()[0].scopes


@pytest.mark.usefixtures("thin_tokens")
@pytest.mark.parametrize("told", [{"sub": "eve"}, {"email": "eve@example.com"}])
def test_userinfo_of_somebody_else_says_nothing(
    sso: SignIn, told: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def userinfo(*_: Any, **__: Any) -> dict[str, Any]:
        return {"sub": "ann", "email": "ann@example.com", "email_verified": True, "groups": ["team"], **told}

    client = sso.member()
    back = sso.way_back(client)
    monkeypatch.setattr(StarletteOAuth2App, "userinfo", userinfo)
    answer = client.get(back)
    assert answer.status_code == 403 and "not say that it verified" in answer.text


def test_signing_in_leads_to_no_other_site(sso: SignIn, key: str) -> None:
    client = sso.member()
    assert client.get(sso.way_back(client, "ann", "//evil.example")).headers["location"] == "/"
    form = {"key": key, "csrf": csrf(client, "/releases"), "next": "https://evil.example/"}
    assert client.post("/sign-in", data=form).headers["location"] == "/"


def test_the_claims_that_name_people_are_settings() -> None:
    def rules(**more: Any) -> Oidc:
        return Oidc(**{"issuer": "https://id.example", **RULES, **more})

    renamed = rules(readers=["*"], name_claim="upn", groups_claim="roles")
    assert scopes_of({"upn": "x"}, renamed) == READ
    assert "operate" in scopes_of({"upn": "x", "roles": ["platform"]}, renamed)
    assert scopes_of({"upn": "platform"}, renamed) == READ, "a person's name is not that of a group"
    with pytest.raises(AccessError, match="'upn'"):
        scopes_of({"email": "x"}, renamed)
    people = rules(operators=["ann"], readers=["bob"], name_claim="upn")
    assert "operate" in scopes_of({"upn": "ann"}, people) and scopes_of({"upn": "bob"}, people) == READ
    assert scopes_of({"upn": "x", "groups": ["ann", "bob"]}, people) == ()
    mail = {"operators": ["ann@example.com"]}
    with pytest.raises(AccessError, match="trust_emails"):
        scopes_of({"email": "ann@example.com"}, rules(**mail))
    assert "operate" in scopes_of({"email": "ann@example.com"}, rules(**mail, trust_emails=True))


@pytest.mark.parametrize(
    "wrong",
    [
        {"client_id": ""}, {"console_url": ""}, {"reader_groups": [], "operator_groups": []}, {"operators": ["*"]},
        {"operator_groups": ["*"]}, {"reader_groups": ["*"]},
        {"issuer": "id.example"}, {"issuer": "https://me:pw@id.example"},
    ],
)  # fmt: skip
def test_half_a_provider_is_an_error_of_the_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Oidc(**{"issuer": "https://id.example", **RULES, **wrong})
