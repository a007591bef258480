from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.errors import ConfigError
from core.loading import load_settings
from tests.support.command_line import ratchet
from tests.support.web_server import WebServer, reply, web_server

RELEASE = json.dumps({"number": 4, "share": 1, "clip": None, "vlm": None}).encode()
ASKING = {
    "/admin/v1/rollback": ["rollback"],
    "/admin/v1/releases": ["create", "--clip", "base"],
    "/admin/v1/promote": ["promote"],
    "/admin/v1/hold": ["hold"],
    "/admin/v1/resume": ["resume"],
}


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    monkeypatch.setenv("USER", "ann")
    monkeypatch.delenv("LOGNAME", raising=False)
    with web_server() as server:
        server.pages = {path: reply(RELEASE) for path in ASKING}
        yield server


def url(server: WebServer) -> str:
    return f"http://{server.host}:{server.port}"


def heads(server: WebServer) -> list[list[str]]:
    return [head.lower().splitlines() for head in server.asked]


@pytest.mark.parametrize("by", ["setting", "option"])
def test_what_operators_do_is_sent_to_the_server_under_their_name(by: str, far: WebServer, tmp_path: Path) -> None:
    setting, option = (url(far), []) if by == "setting" else ("http://127.0.0.1:9", ["--server", url(far)])
    flags = ["--set", "serve.operator_key=s3cret", "--set", f"server_url={setting}"]
    for words in ASKING.values():
        done = ratchet(tmp_path, *flags, "releases", *words, "--reason", "why", *option)
        assert done.exit_code == 0, done.output
    assert [head[0] for head in heads(far)] == [f"post {path} http/1.1" for path in ASKING]
    for head in heads(far):
        assert {"authorization: bearer s3cret", "x-ratchet-actor: ann"} <= set(head)


def test_status_asks_the_server_and_says_when_it_is_refused(
    far: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = reply(b'{"error": {"message": "this key is not valid."}}', "401 Unauthorized")
    far.pages = {"/health/ready": reply(b'{"release": 4}'), "/admin/v1/status": refused}
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("RATCHET_SERVE__OPERATOR_KEY", "of-before")
    facts = json.loads(ratchet(tmp_path, "status", "--json", "--server", url(far)).stdout)
    assert facts["health"] == {"ready": True, "release": 4}
    assert facts["trouble"] == "this key is not valid."
    assert "authorization: bearer of-before" in heads(far)[1]


def test_no_key_is_made_for_a_server_of_another_machine(far: WebServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        ratchet(tmp_path, "releases", "hold", "-r", "why", "--server", url(far))
    assert "RATCHET_SERVE__OPERATOR_KEY" in caught.value.fix
    assert not (tmp_path / "operator.key").exists() and far.asked == []
    status = ratchet(tmp_path, "status", "--json", "--server", url(far))
    assert "RATCHET_SERVE__OPERATOR_KEY" in json.loads(status.stdout)["trouble"]


def test_on_one_machine_nothing_has_to_be_said_and_an_address_that_is_no_url_is_refused(tmp_path: Path) -> None:
    settings = load_settings(overrides={"home": str(tmp_path), "serve.port": 8123}, environ={})
    assert settings.server == settings.serve.url == "http://127.0.0.1:8123"
    assert settings.operator_key() == settings.operator_key()
    for wrong in ("serve:8000", "ftp://serve", "http://", "http:// serve"):
        with pytest.raises(ConfigError, match="server_url"):
            load_settings(overrides={"server_url": wrong}, environ={})
