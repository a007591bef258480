"""The command line as a whole, and the commands of single parts."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
import typer

from core.addresses import free_port
from core.errors import LedgerError, LedgerUnavailable, RatchetError
from core.ledger import Ledger
from core.loading import load_settings
from ops.cli.main import app, main
from ops.cli.parts import make_ready
from serving.engines.clip_base import list_bases
from tests.support.command_line import ratchet
from tests.support.pages import ROOT
from tests.support.tiny import tiny_base
from tests.support.tiny_vlm import tiny_vlm_base

GIVEN: dict[str, Any] = {
    "recipe": {"name": "default"}, "seed": 1, "store_version": 0, "data_from": {}, "data_to": {}, "incumbent": None,
}  # fmt: skip


def test_a_known_error_is_shown_with_its_fix_and_without_a_traceback(tmp_path: Path) -> None:
    file = tmp_path / "ratchet.yaml"
    file.write_text("serve: {prt: 1}")
    words = [sys.executable, "-m", "ops.cli.main", "--config", str(file), "config", "show"]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "serve.prt" in result.stderr and "serve.port" in result.stderr and "Traceback" not in result.stderr


def test_what_an_image_without_models_lacks_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "ops.cli.main.app", Mock(side_effect=ModuleNotFoundError(name="no_torch.nn"), registered_groups=[])
    )
    with pytest.raises(SystemExit, match="1"):
        main()
    assert "this needs no_torch.nn" in (said := capsys.readouterr().err) and "not slim" in said


def test_the_ledger_is_migrated_as_often_as_one_likes_and_its_password_is_not_shown(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    for _ in range(2):
        result = ratchet(tmp_path, "--set", f"ledger_url={url}", "admin", "migrate")
        assert (result.exit_code, "up to date" in result.output) == (0, True)
    Ledger.open(url, migrate=False).close()
    with pytest.raises(LedgerUnavailable, match=r"127\.0\.0\.1:1") as away:
        ratchet(tmp_path, "--set", "ledger_url=postgresql://me:hunter2@127.0.0.1:1/x", "admin", "migrate")
    assert "hunter2" not in str(away.value)


def test_an_update_is_abandoned_with_a_reason_and_taken_up_again_unless_another_one_followed(tmp_path: Path) -> None:
    ledger = Ledger.open(load_settings(overrides={"home": tmp_path}).ledger)
    ledger.begin_update("update-1", family="clip", **GIVEN)
    abandon = ("trainer", "abandon", "update-1", "--reason")
    assert ratchet(tmp_path, *abandon, "broken pictures").exit_code == 0
    update = ledger.update("update-1")
    assert update.state == "failed" and str(update.error).endswith(": broken pictures")
    with pytest.raises(LedgerError):
        ratchet(tmp_path, *abandon, "again")
    ledger.advance_update("update-1", cost={"attempts": 3})
    assert ratchet(tmp_path, "trainer", "retry", "update-1").exit_code == 0
    update = ledger.update("update-1")
    assert (update.state, update.error, update.cost["attempts"]) == ("training", None, 0)
    assert [row.action for row in ledger.audit_rows(subject="update update-1")] == ["update.retry", "update.abandon"]
    ledger.advance_update("update-1", "failed", error="it broke off")
    ledger.begin_update("update-2", family="clip", **GIVEN)
    for name, message in (("update-1", "not the newest"), ("update-3", "")):
        with pytest.raises(LedgerError, match=message):
            ratchet(tmp_path, "trainer", "retry", name)
    assert ledger.update("update-1").state == "failed"


def commands(group: Any, words: str = "") -> dict[str, Any]:
    """Commands of a group, and of the groups in it, by their words."""
    below = getattr(group, "commands", {}).items()
    found = {f"{words} {name}".strip(): child for name, child in below}
    return found | {k: v for name, child in below for k, v in commands(child, f"{words} {name}").items()}


def test_what_prints_a_table_prints_json_as_well() -> None:
    known = commands(typer.main.get_command(app))
    code = {words: inspect.getsource(inspect.unwrap(each.callback)) for words, each in known.items() if each.callback}
    tables = {words for words, text in code.items() if "show_rows(" in text}
    assert {"releases list", "keys list", "samples list", "doctor", "recipes list", "demo data list"} <= tables
    for words in tables:
        [option] = [each for each in known[words].params if "--json" in each.opts]
        assert option.help, words


# Bases


@pytest.fixture
def home(tmp_path: Path) -> Path:
    tiny_base(tmp_path)
    tiny_vlm_base(tmp_path)
    return tmp_path


def test_a_first_start_makes_no_vlm_where_none_is_wanted_and_no_other_base_than_the_shipped_ones(home: Path) -> None:
    known = {"home": str(home), "base.clip": list_bases(home, "clip")[0], "base.vlm": ""}
    make_ready(load_settings(None, known))
    assert list_bases(home, "vlm") == ["tiny-vlm"]
    for setting, option in (("base.clip", "--model"), ("base.vlm", "--family vlm")):
        with pytest.raises(RatchetError, match="'mine' is not registered") as caught:
            make_ready(load_settings(None, {**known, setting: "mine"}))
        assert option in caught.value.fix


# Metrics


def test_the_exporter_tells_what_replicas_wrote(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "ops.cli.main", "metrics", "serve", str(tmp_path), "--port", str(port)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    writing = {**environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    refused = subprocess.run(command, env=writing, capture_output=True, text=True)  # it would write among them
    assert refused.returncode == 1 and "PROMETHEUS_MULTIPROC_DIR" in refused.stderr
    wrote = "from core import metrics; metrics.http.refused('overloaded')"
    subprocess.run([sys.executable, "-c", wrote], env=writing, check=True)
    written = sorted(tmp_path.iterdir())
    process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert str(port) in process.stderr.readline()  # it listens
        page = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        assert 'ratchet_http_refused_total{reason="overloaded"} 1.0' in page
        assert sorted(tmp_path.iterdir()) == written
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
