"""The command line as a whole, and the commands of single parts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
import yaml
from typer.testing import CliRunner

from core.addresses import free_port
from core.errors import ConfigError, LedgerError, LedgerUnavailable, RatchetError
from core.ledger import Ledger
from core.loading import load_settings
from ops.cli.context import Context
from ops.cli.main import app
from ops.cli.parts import make_ready
from serving.engines.clip_base import list_bases
from tests.support.command_line import ratchet
from tests.support.pages import ROOT
from tests.support.tiny import tiny_base
from tests.support.tiny_vlm import tiny_vlm_base

COMMAND = typer.main.get_command(app)
"""Made once: a runner makes it for each call."""
GIVEN: dict[str, Any] = {
    "recipe": {"name": "default"}, "seed": 1, "store_version": 0, "data_from": {}, "data_to": {}, "incumbent": None,
}  # fmt: skip


def leaves(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    children = getattr(command, "commands", None)
    if children is None:
        yield words
    for name, child in (children or {}).items():
        yield from leaves(child, (*words, name))


@pytest.mark.parametrize("words", leaves(COMMAND), ids=" ".join)
def test_every_command_has_help(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMAND([*words, "--help"], prog_name="ratchet", standalone_mode=False) == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    ["releases list", "keys list", "base list", "recipes list", "demo data list", "samples deletions", "audit",
     "config show", "quarantine list", "doctor", "status"],
)  # fmt: skip
def test_what_is_a_table_is_json_as_well(words: str, tmp_path: Path) -> None:
    flags = ["--set", "base.vlm=", "--set", "serve.port=1", "--set", "kafka.bootstrap=127.0.0.1:1"]
    assert json.loads(ratchet(tmp_path, *flags, *words.split(), "--json").stdout) is not None


def test_a_known_error_is_shown_with_its_fix_and_without_a_traceback(tmp_path: Path) -> None:
    file = tmp_path / "ratchet.yaml"
    file.write_text("serve: {prt: 1}")
    words = [sys.executable, "-m", "ops.cli.main", "--config", str(file), "config", "show"]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "serve.prt" in result.stderr and "serve.port" in result.stderr and "Traceback" not in result.stderr


def test_settings_are_shown_with_their_origin_checked_and_passed_on_to_child_processes(tmp_path: Path) -> None:
    shown = json.loads(ratchet(tmp_path, "--set", "serve.port=9001", "config", "show", "--json").output)
    assert shown["serve.port"] == {"value": "9001", "origin": "flag"}
    assert shown["kafka.topic"]["origin"] == "default"
    assert "1 are not the defaults" in ratchet(tmp_path, "config", "check").output
    with pytest.raises(ConfigError, match=r"serve\.prt"):
        ratchet(tmp_path, "--set", "serve.prt=1", "config", "check")
    child = Context(tmp_path / "r.yaml", ["serve.port=9001"]).command("serve")
    own = ["-m", "ops.cli.main", "--config", str(tmp_path / "r.yaml"), "--set", "serve.port=9001"]
    assert child[1:] == [*own, "serve"]
    assert ratchet(tmp_path, "--version").output == f"ratchet {version('ratchet-server')}\n"


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


# Bases


@pytest.fixture
def home(tmp_path: Path) -> Path:
    tiny_base(tmp_path)
    tiny_vlm_base(tmp_path)
    return tmp_path


def test_bases_are_listed_by_family_shown_with_their_layers_and_registered_from_a_folder(home: Path) -> None:
    both = ratchet(home, "base", "list").output
    for fact in ("tiny-vlm", "Idefics3ForConditionalGeneration", "images of"):
        assert fact in both
    assert "Idefics3" not in ratchet(home, "base", "list", "--family", "clip").output
    assert "images of" not in ratchet(home, "base", "list", "--family", "vlm").output
    shown = ratchet(home, "base", "show", "tiny-vlm").output
    for fact in ("random weights, for tests", "LoRA in connector", "LoRA in image", "LoRA in text"):
        assert fact in shown
    with pytest.raises(RatchetError, match="there is no base 'tinny'") as caught:
        ratchet(home, "base", "show", "tinny")
    assert "tiny-vlm" in caught.value.fix
    of_vlm = ("--family", "vlm", "--model", str(home / "bases" / "tiny-vlm" / "model"))
    assert "mine" in ratchet(home, "base", "add", "mine", *of_vlm).output
    assert list_bases(home, "vlm") == ["mine", "tiny-vlm"]
    with pytest.raises(RatchetError, match="--weights is for a CLIP"):
        ratchet(home, "base", "add", "m", *of_vlm, "--weights", "x.safetensors")


def test_a_first_start_makes_no_vlm_where_none_is_wanted_and_no_other_base_than_the_shipped_ones(home: Path) -> None:
    known = {"home": str(home), "base.clip": list_bases(home, "clip")[0], "base.vlm": ""}
    make_ready(load_settings(None, known))
    assert list_bases(home, "vlm") == ["tiny-vlm"]
    for setting, option in (("base.clip", "--model"), ("base.vlm", "--family vlm")):
        with pytest.raises(RatchetError, match="'mine' is not registered") as caught:
            make_ready(load_settings(None, {**known, setting: "mine"}))
        assert option in caught.value.fix


# Metrics


def test_prometheus_is_told_the_ports_of_the_settings() -> None:
    ports = ("serve.port=9000", "ingest.metrics_port=0", "updater.metrics_port=9999", "maintain.metrics_port=9998")
    flags = [word for port in (*ports, "serve.ray_metrics_port=9004") for word in ("--set", port)]
    listed = json.loads(CliRunner().invoke(app, [*flags, "metrics", "targets", "--host", "box"]).output)
    assert {each["labels"]["process"]: each["targets"] for each in listed} == {
        "serve": ["box:9000"], "maintain": ["box:9998"], "update": ["box:9999"], "ray": ["box:9004"],
    }  # fmt: skip
    words = ["prometheus", "--host", "box", "--alertmanager", "am:9093", "--rules", "a.yml"]
    done = CliRunner().invoke(app, [*flags, "metrics", *words])
    told = yaml.safe_load(done.stdout)
    assert [job["static_configs"] for job in told["scrape_configs"]] == [listed]
    assert told["rule_files"] == ["a.yml"]
    assert told["alerting"] == {"alertmanagers": [{"static_configs": [{"targets": ["am:9093"]}]}]}
    assert "ingest.metrics_port is 0" in done.stderr


def test_the_exporter_tells_what_replicas_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match="PROMETHEUS_MULTIPROC_DIR"):  # it would write among them
        ratchet(tmp_path, "metrics", "serve", str(tmp_path), "--port", "0")
    wrote = "from core import metrics; metrics.http.refused('overloaded')"
    writing = {**environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", wrote], env=writing, check=True)
    written = sorted(tmp_path.iterdir())
    port = free_port()
    command = [sys.executable, "-m", "ops.cli.main", "metrics", "serve", str(tmp_path), "--port", str(port)]
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
