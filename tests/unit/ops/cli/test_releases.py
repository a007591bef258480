from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.errors import ConfigError, LedgerError, ReleaseError
from core.ledger import Ledger
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


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield opened
    opened.close()


def test_releases_show_tells_where_a_release_came_from(tmp_path: Path, ledger: Ledger) -> None:
    what: dict[str, Any] = {"recipe": {"name": "default"}, "data_from": {"t:0": 0}, "data_to": {"t:0": 10}}
    ledger.begin_update("u1", family="clip", seed=7, store_version=3, incumbent=None, **what)
    ledger.advance_update("u1", "done", adapter="clip-a", cost={"gflops_spent": 12.0})
    shift = {"towers": {}, "gap_before": 0.81, "gap_after": 0.79}
    diagnostics = {"warnings": [], "tail": None, "pairs": {}, "yes": {}, "shift": shift}
    ledger.record_verdict("u1", "clip-a", "passed", "reports/u1", {"diagnostics": diagnostics})
    ledger.commit_release(1, clip="clip-a", vlm=None, actor="updater", reason="gate passed", proposal_id=None)
    shown = ratchet(tmp_path, "releases", "show", "1").output
    for fact in (
        "clip-a", "u1", "default", "'t:0': 10", "passed", "reports/u1", "updater", "gate passed", "12.0",
        "modality gap 0.810 -> 0.790",
    ):  # fmt: skip
        assert fact in shown
    with pytest.raises(LedgerError):
        ratchet(tmp_path, "releases", "show", "9")


def test_releases_tell_whom_each_answers_and_what_was_forced_or_withdrawn(tmp_path: Path, ledger: Ledger) -> None:
    ledger.register_adapter("clip-b", "clip", "f" * 64, "i", "t", {})
    ledger.commit_release(1, clip=None, vlm=None, actor="ratchet", reason="first", proposal_id=None)
    forced = ledger.propose("release", clip="clip-b", actor="ann", reason="sure", share=0.25, forced=True)
    ledger.commit_release(2, clip="clip-b", vlm=None, actor="ann", reason="sure", proposal_id=forced.id, share=0.25)
    ledger.withdraw(["clip-b"], actor="guard", subject="release 2", reason="it disagrees", evidence={})
    listed = ratchet(tmp_path, "releases", "list").output.splitlines()
    assert any(all(word in line for word in ("live", "2", "canary 25%", "clip-b", "f" * 12)) for line in listed)
    assert any(all(word in line for word in ("stable", "1", "all", "base")) for line in listed)
    shown = ratchet(tmp_path, "releases", "show", "2").output
    for fact in ("canary 25%", "no gate had passed it", "clip-b was withdrawn", "it disagrees"):
        assert fact in shown
    with pytest.raises(ReleaseError, match="a shadow has no share"):
        ratchet(tmp_path, "releases", "create", "--clip", "x", "-r", "y", "--shadow", "--share", "0.5")


def test_a_narrow_terminal_shows_whole_names_and_texts_as_written(tmp_path: Path, ledger: Ledger) -> None:
    names = {"clip": "clip-0123456789ab", "vlm": "vlm-ba9876543210"}
    ledger.commit_release(1, **names, actor="ann", reason="[/b] why", proposal_id=None)
    for words in (("releases", "list"), ("releases", "show", "1"), ("status",)):
        shown = ratchet(tmp_path, *words, columns=80)
        assert shown.exit_code == 0, shown.output
        assert {*names.values(), "[/b]"} <= set(shown.output.replace("│", " ").split())
    ledger.create_key("search-page-of-the-shop", ["infer"], actor="ann")
    assert "search-page-of-the-shop" in ratchet(tmp_path, "keys", "list", columns=80).output
    assert "serve.encoder_replicas" in ratchet(tmp_path, "config", "show", columns=80).output
