"""Signing in through an identity provider, over real HTTP."""

from __future__ import annotations

import html
from collections.abc import Iterator
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

RULES = {
    "client_id": "ratchet", "client_secret": "s3cret", "console_url": FAR, "reader_groups": ["team"],
    "operator_groups": ["platform"],
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("at_once")
UNVERIFIED = (False, None, "false", "true", 1)


@pytest.fixture(scope="module")
def issuer() -> Iterator[str]:
    with oidc_provider_mock.run_server_in_thread() as server:
        yield f"http://localhost:{server.server_port}"


def console(home: Path, issuer: str, **rules: Any) -> TestClient:
    return visit(home, FAR, console={"host": "0.0.0.0", "oidc": {"issuer": issuer, **RULES, **rules}})


def keys(home: Path) -> Ledger:
    return Ledger.open(Settings(home=home).ledger)


def someone(issuer: str, name: str, **claims: Any) -> None:
    facts = {"email": f"{name}@example.com", "email_verified": True, **claims}
    httpx.put(f"{issuer}/users/{name}", json=facts).raise_for_status()


def member(home: Path, issuer: str, **claims: Any) -> TestClient:
    someone(issuer, "ann", groups=["team"], **claims)
    return console(home, issuer)


def way_back(client: TestClient, issuer: str, name: str = "ann", next_page: str = "/") -> str:
    """Go to the provider and sign in there. Returns the URL that it redirects to."""
    away = client.get("/sign-in/oidc", params={"next": next_page})
    assert away.status_code == 302 and away.headers["location"].startswith(issuer)
    query = parse_qs(urlsplit(away.headers["location"]).query)
    assert query["code_challenge_method"] == ["S256"] and query["nonce"]
    assert query["redirect_uri"] == [f"{FAR}/sign-in/oidc/done"]
    sent = httpx.post(away.headers["location"], data={"sub": name})
    assert sent.status_code == 302, sent.text
    return sent.headers["location"]


def test_a_member_of_a_group_may_look_and_one_of_the_operators_may_act(tmp_path: Path, issuer: str) -> None:
    someone(issuer, "ann", groups=["staff", "team"])
    someone(issuer, "Zoë O'Hara", email="Zoë.O'Hara@example.com", groups="platform")
    for name, scopes, key_name in (
        ("ann", ("infer", "search"), "ann@example.com."),
        ("Zoë O'Hara", ("infer", "search", "publish", "operate"), "zo-.o-hara@example.com."),
    ):
        client = console(tmp_path, issuer)
        assert issuer.removeprefix("http://").split(":")[0] in client.get("/sign-in").text
        arrived = client.get(way_back(client, issuer, name, "/releases"))
        assert arrived.status_code == 303 and arrived.headers["location"] == "/releases"
        assert client.get("/releases").status_code == 200
        row = keys(tmp_path).api_keys()[0]
        assert row.scopes == list(scopes) and row.name.startswith(key_name) and row.expires_at is not None
        signed = keys(tmp_path).audit_rows(1)[0]
        assert (signed.actor, signed.action) == (f"key:{row.name}", "sign in")
        assert (signed.detail["issuer"], signed.detail["subject"]) == (issuer, name)


def test_signing_out_ends_the_key_and_the_session_of_the_provider(tmp_path: Path, issuer: str) -> None:
    """Through a page: browsers allow no form that redirects to another site."""
    client = member(tmp_path, issuer)
    client.get(way_back(client, issuer))
    assert len(keys(tmp_path).api_keys()) == 1
    answer = client.post("/sign-out", data={"csrf": csrf(client, "/releases")})
    seconds, _, url = answer.headers["refresh"].partition(";url=")
    query = parse_qs(urlsplit(url).query)
    assert answer.status_code == 200 and seconds == "0" and url.startswith(f"{issuer}/oauth2/end_session?")
    assert query["client_id"] == ["ratchet"] and query["id_token_hint"][0].count(".") == 2
    assert "Signed in as" not in answer.text and html.escape(url) in answer.text
    assert keys(tmp_path).api_keys() == []
    assert client.get("/releases").status_code == 303


@pytest.mark.parametrize("wrong", ["no endpoint", "large token"])
def test_signing_out_does_what_it_can(tmp_path: Path, issuer: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = member(tmp_path, issuer, note="x" * (4000 if wrong == "large token" else 1))
    arrived = client.get(way_back(client, issuer))
    assert arrived.status_code == 303 and client.get("/releases").status_code == 200
    metadata = client.app.state.provider.server_metadata  # type: ignore[attr-defined]
    if wrong == "no endpoint":
        monkeypatch.delitem(metadata, "end_session_endpoint")
    answer = client.post("/sign-out", data={"csrf": csrf(client, "/releases")})
    if wrong == "no endpoint":
        assert answer.status_code == 303 and answer.headers["location"] == "/"
    else:
        assert "id_token_hint" not in answer.headers["refresh"] and "client_id=ratchet" in answer.headers["refresh"]


@pytest.mark.parametrize(
    ("characters", "next_page"), [(1, "/"), (1, "/releases?a=" + "x" * 980), (1300, "/releases?a=" + "x" * 980)]
)
def test_a_proxy_with_room_for_4_kb_of_headers_passes_each_answer_of_a_sign_in_on(
    tmp_path: Path, issuer: str, characters: int, next_page: str
) -> None:
    """The default of nginx, which answers 502 otherwise."""
    client = member(tmp_path, issuer, note="x" * characters)
    away = client.get("/sign-in/oidc", params={"next": next_page})
    arrived = client.get(way_back(client, issuer, "ann", next_page))
    assert arrived.status_code == 303 and arrived.headers["location"] == next_page
    for answer in (away, arrived):
        assert sum(len(name) + len(value) + 4 for name, value in answer.headers.raw) < 4000
    if characters == 1:
        left = client.post("/sign-out", data={"csrf": csrf(client, "/releases")})
        assert "id_token_hint" in left.headers["refresh"]


def test_signing_out_forgets_the_key_while_the_ledger_is_away(
    tmp_path: Path, issuer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = member(tmp_path, issuer)
    client.get(way_back(client, issuer))
    token = csrf(client, "/releases")

    def away(*_: Any, **__: Any) -> None:
        raise LedgerUnavailable("no route to host")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "revoke_key", away)
        assert client.post("/sign-out", data={"csrf": token}).status_code == 200
    assert client.get("/releases").status_code == 303, "the browser has no key any more"


def test_a_key_that_somebody_made_outlives_its_session(tmp_path: Path, issuer: str) -> None:
    client = console(tmp_path, issuer)
    _, token = keys(tmp_path).create_key("bob", ["search"], actor="t")
    client.post("/sign-in", data={"key": token, "csrf": csrf(client)})
    assert client.post("/sign-out", data={"csrf": csrf(client, "/releases")}).status_code == 303
    assert [row.name for row in keys(tmp_path).api_keys()] == ["bob"]


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ({"groups": ["others", "x"]}, "may not use this console. Groups that the provider sent: others, x."),
        *(({"email_verified": value, "groups": ["team"]}, "not say that it verified") for value in UNVERIFIED),
        ({"email": "", "groups": ["team"]}, "no claim"), ({"groups": {"team": 1}}, "sent: none"),
    ],
)  # fmt: skip
def test_who_is_not_named_gets_no_key(tmp_path: Path, issuer: str, claims: dict[str, Any], words: str) -> None:
    someone(issuer, "eve", **claims)
    client = console(tmp_path, issuer)
    answer = client.get(way_back(client, issuer, "eve"))
    assert answer.status_code == 403 and words in answer.text
    assert keys(tmp_path).api_keys(ended=True) == []
    assert client.get("/releases").status_code == 303


def test_a_code_is_taken_in_the_browser_that_asked_for_it_and_once(tmp_path: Path, issuer: str) -> None:
    someone(issuer, "ann", groups=["team"])
    client, other = console(tmp_path, issuer), console(tmp_path, issuer)
    back = way_back(client, issuer)
    other.get("/sign-in/oidc")
    for stranger in (other, console(tmp_path, issuer)):
        answer = stranger.get(back)
        assert answer.status_code == 401 and "did not work" in answer.text
    assert client.get(back).status_code == 303
    assert client.get(back).status_code == 401
    assert len(keys(tmp_path).api_keys()) == 1


def test_a_provider_that_is_away_or_no_provider_is_said_so(tmp_path: Path, issuer: str) -> None:
    for address in ("http://localhost:1", f"{issuer}/nowhere"):
        answer = console(tmp_path, address).get("/sign-in/oidc")
        assert answer.status_code == 503 and "API key" in answer.text
        assert ("Try again" in answer.text) is ("nowhere" not in address), "trying again changes no setting"
    without = visit(tmp_path)
    assert without.get("/sign-in/oidc").status_code == 404 and "/sign-in/oidc" not in without.get("/sign-in").text


@pytest.mark.parametrize(
    ("error", "again"),
    [("invalid_client", False), ("invalid_scope", False), ("invalid_grant", True)],
)
def test_an_error_of_the_settings_does_not_ask_the_user_to_try_again(
    tmp_path: Path, issuer: str, monkeypatch: pytest.MonkeyPatch, error: str, again: bool
) -> None:
    async def fails(*_: Any, **__: Any) -> None:
        raise OAuthError(error, "the provider's words")

    client = member(tmp_path, issuer)
    back = way_back(client, issuer)
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
def test_groups_that_only_userinfo_has_count(tmp_path: Path, issuer: str) -> None:
    someone(issuer, "ann", groups=["/platform", "platform"])
    client = console(tmp_path, issuer, readers=["*"])
    assert client.get(way_back(client, issuer)).status_code == 303
    assert "operate" in keys(tmp_path).api_keys()[0].scopes
    assert keys(tmp_path).audit_rows(1)[0].detail["groups"] == ["/platform", "platform"]


@pytest.mark.usefixtures("thin_tokens")
@pytest.mark.parametrize("told", [{"sub": "eve"}, {"email": "eve@example.com"}])
def test_userinfo_of_somebody_else_says_nothing(
    tmp_path: Path, issuer: str, told: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def userinfo(*_: Any, **__: Any) -> dict[str, Any]:
        return {"sub": "ann", "email": "ann@example.com", "email_verified": True, "groups": ["team"], **told}

    client = member(tmp_path, issuer)
    back = way_back(client, issuer)
    monkeypatch.setattr(StarletteOAuth2App, "userinfo", userinfo)
    answer = client.get(back)
    assert answer.status_code == 403 and "not say that it verified" in answer.text


@pytest.mark.usefixtures("thin_tokens")
def test_a_provider_whose_userinfo_fails_signs_in_by_what_its_token_says(tmp_path: Path, issuer: str) -> None:
    someone(issuer, "ann")
    client = console(tmp_path, issuer, readers=["*"], trust_emails=True)
    back = way_back(client, issuer)
    client.app.state.provider.server_metadata["userinfo_endpoint"] = f"{issuer}/nowhere"  # type: ignore[attr-defined]
    assert client.get(back).status_code == 303


@pytest.mark.parametrize("target", ["https://evil.example/", "//evil.example", "/audit?about=" + "x" * 5000])
def test_signing_in_leads_to_no_other_site_and_by_no_long_way(tmp_path: Path, issuer: str, target: str) -> None:
    client = member(tmp_path, issuer)
    assert client.get(way_back(client, issuer, "ann", target)).headers["location"] == "/"
    key = Settings(home=tmp_path).operator_key().get_secret_value()
    form = {"key": key, "csrf": csrf(client, "/releases"), "next": target}
    assert client.post("/sign-in", data=form).headers["location"] == "/"


def test_who_may_only_look_is_told_where_the_groups_are_that_came(tmp_path: Path, issuer: str) -> None:
    someone(issuer, "ann", groups=["/ml-platform"])
    client = console(tmp_path, issuer, readers=["*"])
    client.get(way_back(client, issuer))
    assert keys(tmp_path).audit_rows(1)[0].detail["groups"] == ["/ml-platform"]
    answer = client.post("/releases/hold", data={"csrf": csrf(client, "/releases"), "reason": "x"})
    assert answer.status_code == 403 and "audit log" in answer.text and "console.oidc" in answer.text


def test_an_answer_of_another_issuer_is_none(tmp_path: Path, issuer: str) -> None:
    someone(issuer, "ann", groups=["team"])
    other_name = issuer.replace("localhost", "127.0.0.1")
    client = console(tmp_path, issuer)
    back = way_back(client, issuer)
    client.app.state.data.settings = Settings(  # type: ignore[attr-defined]
        home=tmp_path, console={"host": "0.0.0.0", "oidc": {"issuer": other_name, **RULES}}
    )
    answer = client.get(back)
    assert answer.status_code == 401 and issuer in answer.text and "console.oidc.issuer" in answer.text
    assert keys(tmp_path).api_keys() == []


def test_the_claims_that_name_people_are_settings() -> None:
    rules = Oidc(issuer="https://id.example", **{**RULES, "readers": ["*"]}, name_claim="upn", groups_claim="roles")  # type: ignore[arg-type]
    assert scopes_of({"upn": "x"}, rules) == READ
    assert "operate" in scopes_of({"upn": "x", "roles": ["platform"]}, rules)
    assert scopes_of({"upn": "platform"}, rules) == READ, "a person's name is not that of a group"
    people = Oidc(issuer="https://id.example", **{**RULES, "operators": ["ann"], "readers": ["bob"]}, name_claim="upn")  # type: ignore[arg-type]
    assert "operate" in scopes_of({"upn": "ann"}, people) and scopes_of({"upn": "bob"}, people) == READ
    assert scopes_of({"upn": "x", "groups": ["ann", "bob"]}, people) == ()
    with pytest.raises(AccessError, match="'upn'"):
        scopes_of({"email": "x"}, rules)
    mail = {"issuer": "https://id.example", **RULES, "operators": ["ann@example.com"]}
    with pytest.raises(AccessError, match="trust_emails"):
        scopes_of({"email": "ann@example.com"}, Oidc(**mail))  # type: ignore[arg-type]
    assert "operate" in scopes_of({"email": "ann@example.com"}, Oidc(**mail, trust_emails=True))  # type: ignore[arg-type]


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
