"""Commands find the model server and its key in one way: from another pod as on the machine that serves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from core.errors import ConfigError
from core.loading import load_settings
from core.settings import Settings
from ops.cli.main import app
from tests.support.web_server import WebServer, reply, web_server

ROOT = Path(__file__).parents[3]
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
    """A model server of another machine."""
    monkeypatch.setenv("USER", "ann")
    monkeypatch.delenv("LOGNAME", raising=False)
    with web_server() as server:
        server.pages = {path: reply(RELEASE) for path in ASKING}
        yield server


def url(server: WebServer) -> str:
    return f"http://{server.host}:{server.port}"


def heads(server: WebServer) -> list[list[str]]:
    return [head.lower().splitlines() for head in server.asked]


@pytest.mark.parametrize("path", ASKING)
@pytest.mark.parametrize("by", ["setting", "option"])
def test_what_operators_do_is_sent_to_the_server_of_the_settings_under_their_name(
    path: str, by: str, far: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RATCHET_HOME", str(tmp_path))
    monkeypatch.setenv("RATCHET_SERVE__OPERATOR_KEY", "s3cret")
    monkeypatch.setenv("RATCHET_SERVER_URL", url(far) if by == "setting" else "http://127.0.0.1:9")
    option = [] if by == "setting" else ["--server", url(far)]
    done = CliRunner().invoke(app, ["releases", *ASKING[path], "--reason", "why", *option])
    assert done.exit_code == 0, done.output
    (head,) = heads(far)
    assert head[0] == f"post {path} http/1.1"
    assert {"authorization: bearer s3cret", "x-ratchet-actor: ann"} <= set(head)


def test_status_asks_the_server_of_the_settings_and_says_when_it_is_refused(
    far: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far.pages = {
        "/health/ready": reply(b'{"release": 4}'),
        "/admin/v1/status": reply(b'{"error": {"message": "this key is not valid."}}', "401 Unauthorized"),
    }
    monkeypatch.setenv("RATCHET_HOME", str(tmp_path))
    monkeypatch.setenv("RATCHET_SERVE__OPERATOR_KEY", "of-before")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    done = CliRunner().invoke(app, ["status", "--json", "--server", url(far)])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["health"] == {"ready": True, "release": 4}
    assert facts["trouble"] == "this key is not valid."
    assert "authorization: bearer of-before" in heads(far)[1]


def test_no_key_is_made_for_a_server_of_another_machine(far: WebServer, tmp_path: Path) -> None:
    home = ["--set", f"home={tmp_path}"]
    done = CliRunner().invoke(app, [*home, "releases", "hold", "-r", "why", "--server", url(far)])
    assert isinstance(done.exception, ConfigError)
    assert "RATCHET_SERVE__OPERATOR_KEY" in done.exception.fix
    assert not (tmp_path / "operator.key").exists()
    assert far.asked == []
    status = CliRunner().invoke(app, [*home, "status", "--json", "--server", url(far)])
    assert "RATCHET_SERVE__OPERATOR_KEY" in json.loads(status.stdout)["trouble"]


def test_on_one_machine_nothing_has_to_be_said(tmp_path: Path) -> None:
    settings = load_settings(overrides={"home": str(tmp_path), "serve.port": 8123}, environ={})
    assert settings.server == settings.serve.url == "http://127.0.0.1:8123"
    assert settings.operator_key() == settings.operator_key()


@pytest.mark.parametrize("wrong", ["serve:8000", "ftp://serve", "http://", "http:// serve"])
def test_an_address_that_is_no_url_is_refused_by_name(wrong: str) -> None:
    with pytest.raises(ConfigError, match="server_url"):
        load_settings(overrides={"server_url": wrong}, environ={})


def test_only_who_starts_the_server_calls_it_where_it_listens() -> None:
    """Any other command works in a pod of its own, so it goes by ``Settings.server``."""
    folder = ROOT / "ops" / "cli"
    users = {str(path.relative_to(folder)) for path in folder.rglob("*.py") if "serve.url" in path.read_text()}
    assert users == {"parts.py", "supervisor.py"}
    assert "server_url" in Settings.model_fields
