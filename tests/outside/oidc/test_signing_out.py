"""Signing out of the console ends the session that Keycloak keeps."""

from __future__ import annotations

import html
import re
from pathlib import Path

import httpx
import pytest
import yaml
from playwright.sync_api import expect

from core.ledger import Ledger
from tests.outside.oidc.conftest import PASSWORD, SECRET, MakeRealm, csrf, groups, let_in_as, sign_in
from tests.support.browser import chromium, console
from tests.support.console_server import console_server

pytestmark = [pytest.mark.integration, pytest.mark.oidc]
NAMED = {"operators": ["ann@example.com"]}


def test_a_browser_signs_in_and_out_again(
    make_realm: MakeRealm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two sites, as `ratchet console` is run: with a settings file, and the secret in the environment."""
    realm = make_realm(NAMED)
    found = realm.settings.model_dump(mode="json", exclude_unset=True)
    del found["console"]["oidc"]["client_secret"]
    config = tmp_path / "ratchet.yaml"
    config.write_text(yaml.safe_dump(found))
    monkeypatch.setenv("RATCHET_CONSOLE__OIDC__CLIENT_SECRET", SECRET)
    url = realm.settings.console.oidc.console_url
    with console(config, url, tmp_path / "console.log"), chromium() as browser:
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
