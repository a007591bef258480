from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer

from core.errors import ConfigError, LedgerUnavailable
from core.ledger import Ledger
from ops.cli.context import Context
from ops.cli.main import app
from tests.support.command_line import ratchet

COMMAND = typer.main.get_command(app)
"""Made once: a runner makes it for each call."""


def _commands() -> list[list[str]]:
    found: list[list[str]] = []

    def walk(command: Any, words: list[str]) -> None:
        children = getattr(command, "commands", None)
        if children is None:
            found.append(words)
        for name, child in (children or {}).items():
            walk(child, [*words, name])

    walk(COMMAND, [])
    assert len(found) > 15
    return found


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ops.cli.main", *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", _commands(), ids=" ".join)
def test_every_command_has_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMAND([*words, "--help"], prog_name="ratchet", standalone_mode=False) == 0
    assert "Usage" in capsys.readouterr().out


def test_a_known_error_is_shown_with_its_fix_and_without_a_traceback(tmp_path: Path) -> None:
    file = tmp_path / "ratchet.yaml"
    file.write_text("serve: {prt: 1}")
    result = run("--config", str(file), "config", "show")
    assert result.returncode == 1
    assert "serve.prt" in result.stderr and "serve.port" in result.stderr and "Traceback" not in result.stderr


def test_config_show_tells_values_and_origins(tmp_path: Path) -> None:
    shown = json.loads(ratchet(tmp_path, "--set", "serve.port=9001", "config", "show", "--json").output)
    assert shown["serve.port"] == {"value": "9001", "origin": "flag"}
    assert shown["kafka.topic"]["origin"] == "default"


def test_a_child_process_gets_the_same_settings(tmp_path: Path) -> None:
    context = Context(tmp_path / "r.yaml", ["serve.port=9001"])
    assert context.command("serve")[1:] == [
        "-m", "ops.cli.main", "--config", str(tmp_path / "r.yaml"), "--set", "serve.port=9001", "serve",
    ]  # fmt: skip


def test_the_ledger_is_migrated_as_often_as_one_likes_and_its_password_is_not_shown(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    for _ in range(2):
        result = ratchet(tmp_path, "--set", f"ledger_url={url}", "admin", "migrate")
        assert (result.exit_code, "up to date" in result.output) == (0, True)
    Ledger.open(url, migrate=False).close()
    with pytest.raises(LedgerUnavailable, match=r"127\.0\.0\.1:1") as away:
        ratchet(tmp_path, "--set", "ledger_url=postgresql://me:hunter2@127.0.0.1:1/x", "admin", "migrate")
    assert "hunter2" not in str(away.value)


@pytest.mark.parametrize(
    "words",
    ["releases list", "keys list", "base list", "recipes list", "demo data list", "samples deletions", "audit",
     "config show", "quarantine list", "doctor", "status"],
)  # fmt: skip
def test_what_is_a_table_is_json_as_well(words: str, tmp_path: Path) -> None:
    flags = ["--set", "base.vlm=", "--set", "serve.port=1", "--set", "kafka.bootstrap=127.0.0.1:1"]
    assert json.loads(ratchet(tmp_path, *flags, *words.split(), "--json").stdout) is not None


def test_settings_are_checked_and_the_version_is_told(tmp_path: Path) -> None:
    assert "1 are not the defaults" in ratchet(tmp_path, "config", "check").output
    with pytest.raises(ConfigError, match=r"serve\.prt"):
        ratchet(tmp_path, "--set", "serve.prt=1", "config", "check")
    assert ratchet(tmp_path, "--version").output == f"ratchet {version('ratchet-server')}\n"
