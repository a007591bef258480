"""The command line helps, and its errors name the fix."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from core.errors import ReleaseError
from core.ledger import Ledger
from ops.cli.context import Context
from ops.cli.main import app
from ops.cli.status import rollout_line

runner = CliRunner()
BESIDE = {"warnings": [], "tail": None, "pairs": {}, "yes": {},
          "shift": {"towers": {}, "gap_before": 0.81, "gap_after": 0.79}}  # fmt: skip


def _commands() -> list[list[str]]:
    found: list[list[str]] = []

    def walk(command: Any, words: list[str]) -> None:
        children = getattr(command, "commands", None)
        if children is None:
            found.append(words)
        for name, child in (children or {}).items():
            walk(child, [*words, name])

    walk(typer.main.get_command(app), [])
    assert len(found) > 15
    return found


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ops.cli.main", *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", _commands(), ids=" ".join)
def test_every_command_has_help(words: list[str]) -> None:
    result = runner.invoke(app, [*words, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_a_known_error_is_shown_with_its_fix_and_without_a_traceback(tmp_path: Path) -> None:
    file = tmp_path / "ratchet.yaml"
    file.write_text("serve: {prt: 1}")
    result = run("--config", str(file), "config", "show")
    assert result.returncode == 1
    assert "serve.prt" in result.stderr
    assert "serve.port" in result.stderr
    assert "Traceback" not in result.stderr


def test_config_show_tells_values_and_origins(tmp_path: Path) -> None:
    result = runner.invoke(app, ["--set", "serve.port=9001", "config", "show", "--json"])
    shown = json.loads(result.output)
    assert shown["serve.port"] == {"value": "9001", "origin": "flag"}
    assert shown["kafka.topic"]["origin"] == "default"


def test_a_child_process_gets_the_same_settings(tmp_path: Path) -> None:
    context = Context(tmp_path / "r.yaml", ["serve.port=9001"])
    assert context.command("serve")[1:] == [
        "-m", "ops.cli.main", "--config", str(tmp_path / "r.yaml"), "--set", "serve.port=9001", "serve",
    ]  # fmt: skip


def test_doctor_tells_what_is_missing_and_fails_only_for_what_stops_ratchet(tmp_path: Path) -> None:
    flags = ["--set", f"home={tmp_path}", "--set", "serve.vlm_engine=transformers"]
    result = runner.invoke(app, [*flags, "doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "is not registered" in result.output
    assert "ratchet base build" in result.output


def test_doctor_names_extras_in_their_brackets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = runner.invoke(app, ["--set", f"home={tmp_path}", "doctor"], env={"COLUMNS": "200"})
    assert "pip install 'ratchet-server[local]'" in result.output


def test_doctor_fails_when_the_ledger_cannot_be_reached(tmp_path: Path) -> None:
    away = ["--set", "ledger_url=postgresql://a@127.0.0.1:1/b", "--set", 'base.vlm=""']
    result = runner.invoke(app, ["--set", f"home={tmp_path}", *away, "doctor"])
    assert result.exit_code == 1


def test_releases_show_tells_where_a_release_came_from(tmp_path: Path) -> None:
    ledger = Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    ledger.begin_update(
        "u1", family="clip", recipe={"name": "default"}, seed=7, store_version=3,
        data_from={"t:0": 0}, data_to={"t:0": 10}, incumbent=None,
    )  # fmt: skip
    ledger.advance_update("u1", "done", adapter="clip-a", cost={"gflops_spent": 12.0})
    ledger.record_verdict("u1", "clip-a", "passed", "reports/u1", {"diagnostics": BESIDE})
    ledger.commit_release(1, clip="clip-a", vlm=None, actor="updater", reason="gate passed", proposal_id=None)
    ledger.close()
    shown = runner.invoke(app, ["--set", f"home={tmp_path}", "releases", "show", "1"], env={"COLUMNS": "200"}).output
    for fact in (
        "clip-a", "u1", "default", "'t:0': 10", "passed", "reports/u1", "updater", "gate passed", "12.0",
        "modality gap 0.810 -> 0.790",
    ):  # fmt: skip
        assert fact in shown
    listed = runner.invoke(app, ["--set", f"home={tmp_path}", "releases", "list"], env={"COLUMNS": "200"}).output
    assert "live" in listed
    missing = runner.invoke(app, ["--set", f"home={tmp_path}", "releases", "show", "9"])
    assert missing.exit_code != 0


def test_the_ledger_is_migrated_as_often_as_one_likes_and_its_password_is_not_shown(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    for _ in range(2):
        result = runner.invoke(app, ["admin", "migrate"], env={"RATCHET_LEDGER_URL": url})
        assert (result.exit_code, "up to date" in result.output) == (0, True)
    Ledger.open(url, migrate=False).close()
    away = run("--set", "ledger_url=postgresql://me:hunter2@127.0.0.1:1/x", "admin", "migrate")
    assert away.returncode == 1
    assert "127.0.0.1:1" in away.stderr
    assert "hunter2" not in away.stderr


def test_releases_tell_whom_each_answers_and_what_was_forced_or_withdrawn(tmp_path: Path) -> None:
    ledger = Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    ledger.register_adapter("clip-b", "clip", "f" * 64, "i", "t", {})
    ledger.commit_release(1, clip=None, vlm=None, actor="ratchet", reason="first", proposal_id=None)
    forced = ledger.propose("release", clip="clip-b", actor="ann", reason="sure", share=0.25, forced=True)
    ledger.commit_release(
        2, clip="clip-b", vlm=None, actor="ann", reason="sure", proposal_id=forced.id, share=forced.share
    )
    ledger.withdraw(["clip-b"], actor="guard", subject="release 2", reason="it disagrees", evidence={})
    ledger.close()
    arguments, wide = ["--set", f"home={tmp_path}", "releases"], {"COLUMNS": "200"}
    listed = runner.invoke(app, [*arguments, "list"], env=wide).output.splitlines()
    assert any(all(word in line for word in ("live", "2", "canary 25%", "clip-b", "f" * 12)) for line in listed)
    assert any(all(word in line for word in ("stable", "1", "all", "base")) for line in listed)
    shown = runner.invoke(app, [*arguments, "show", "2"], env=wide).output
    for fact in ("canary 25%", "no gate had passed it", "clip-b was withdrawn", "it disagrees"):
        assert fact in shown
    refused = runner.invoke(app, [*arguments, "create", "--clip", "x", "-r", "y", "--shadow", "--share", "0.5"])
    assert isinstance(refused.exception, ReleaseError)
    assert "a shadow has no share" in str(refused.exception)


def test_names_are_whole_in_a_narrow_terminal_and_what_people_wrote_is_shown_as_it_is(tmp_path: Path) -> None:
    names = {"clip": "clip-0123456789ab", "vlm": "vlm-ba9876543210"}
    ledger = Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    ledger.commit_release(1, **names, actor="ann", reason="[/b] why", proposal_id=None)
    ledger.close()
    for words in (("releases", "list"), ("releases", "show", "1"), ("status",)):
        shown = runner.invoke(app, ["--set", f"home={tmp_path}", *words], env={"COLUMNS": "80"})
        assert shown.exit_code == 0, shown.output
        assert {"clip-0123456789ab", "vlm-ba9876543210", "[/b]"} <= set(shown.output.replace("│", " ").split())
    Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}").create_key("search-page-of-the-shop", ["infer"], actor="ann")
    listed = runner.invoke(app, ["--set", f"home={tmp_path}", "keys", "list"], env={"COLUMNS": "80"}).output
    assert "search-page-of-the-shop" in listed
    settings = runner.invoke(app, ["config", "show"], env={"COLUMNS": "80"}).output
    assert "serve.encoder_replicas" in settings


@pytest.mark.parametrize(("words", "once"), [((), False), (("--once",), True)])
def test_maintain_runs_maintenance_under_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], once: bool
) -> None:
    ran: list[tuple[Path, bool]] = []
    part = ModuleType("streams.store.maintenance")
    part.run_maintain = lambda settings, *, once, collect: ran.append((settings.home, once))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "streams.store.maintenance", part)
    assert runner.invoke(app, ["--set", f"home={tmp_path}", "maintain", *words]).exit_code == 0
    assert ran == [(tmp_path, once)]


def test_the_screen_says_what_is_on_trial_and_what_was_seen() -> None:
    told = {
        "state": "canary", "release": 7, "incumbent": 6, "share": 0.1, "seconds_left": None,
        "compared": {"clip": {"agreed": 39, "inputs": 40}},
    }  # fmt: skip
    assert rollout_line(told) == "canary 10% release 7 against 6: clip agrees on 39 of 40\n"
    watched = {**told, "state": "guard", "share": 1.0, "seconds_left": 61.4}
    assert rollout_line(watched) == "guard watches release 7 against 6: clip agrees on 39 of 40, 61 s left\n"
    assert rollout_line({"state": "idle"}) == ""
