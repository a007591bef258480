"""Mistakes at the command line: each ends in a few lines that name what is wrong and what to do."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from core.ledger import Ledger
from ops.cli.main import main
from streams.store.sample_store import SampleStore

MOST_LINES = 10
AWAY = "127.0.0.1:1"
POSTGRES = f"ledger_url=postgresql://me:hunter2@{AWAY}/x"
NO_REASON = "--reason is required without a terminal"

OF_SETTINGS = {
    # name: ratchet.yaml, arguments, variables, words of the output
    "name in the file": ("serve: {prt: 1}", "config check", {}, ("serve.prt", "ratchet.yaml", "'serve.port'")),
    "section in the file": ("sevre: {port: 1}", "config check", {}, ("'sevre'", "ratchet.yaml", "config show")),
    "name of a flag": ("", "--set serve.prt=1 config check", {}, ("serve.prt", "flag", "serve.port")),
    "flag without a value": ("", "--set serve.port config check", {}, ("'serve.port'", "Write --set NAME=VALUE")),
    "name of a variable": ("", "config check", {"RATCHET_SERVE__PRT": "1"}, ("RATCHET_SERVE__PRT", "serve.port")),
    "YAML": ("serve: [1", "config check", {}, ("ratchet.yaml is not YAML", "line 1", "Fix the line")),
    "a list": ("- serve", "config check", {}, ("ratchet.yaml must hold a mapping",)),
    "type": ("serve: {port: web}", "config check", {}, ("serve.port = 'web'", "ratchet.yaml", "integer")),
    "range": ("", "--set serve.port=99999 config check", {}, ("serve.port = '99999'", "less than or equal to 65535")),
    "unit": ("gc: {hours: 2h}", "config check", {}, ("gc.hours = '2h'", "number")),
    "recipe": ("updater: {recipe: nosuch}", "config show", {}, ("updater.recipe", "'nosuch'", "Use one of")),
    "no such file": ("", "-c none.yaml config check", {}, ("none.yaml does not exist", "Check --config")),
    "a folder as file": ("", "-c . config check", {}, ("settings file .", "Is a directory", "Check --config")),
    "ledger's URL": ("", "--set ledger_url=nonsense releases list", {}, ("ledger_url", "Use sqlite:///PATH")),
    "database away": ("", f"--set {POSTGRES} releases list", {}, (AWAY, "Is the database up")),
    "server's URL": ("", "--set server_url=serve:8000 releases list", {}, ("server_url", "pattern")),
    "home is a file": ("", "--set home=ratchet.yaml admin migrate", {}, ("ratchet.yaml", "--set home=DIR")),
    "home below a file": ("", "--set home=ratchet.yaml/x up", {}, ("ratchet.yaml/x", "--set home=DIR")),
    "home that cannot be made": ("", "--set home=/proc/ratchet admin migrate", {}, ("/proc/ratchet", "RATCHET_HOME")),
}  # fmt: skip
ELSEWHERE = (
    "releases list", "releases show 1", "keys create ann -s infer", "keys list", "audit", "status", "samples list",
    "samples stats", "samples deletions", "quarantine list", "gate report", "adapters export x y", "admin gc",
    "releases rollback --offline -r x", "trainer retry update-1", "base switch b16 -r x",
)  # fmt: skip
OF_COMMANDS = {
    "relases list": ("'relases'", "Did you mean 'releases'"),
    "releases lst": ("'lst'", "Did you mean 'list'"),
    "releases list --limt 5": ("--limt", "--limit"),
    "releases list --limit many": ("--limit", "integer"),
    "releases show": ("Missing argument", "number"),
    "releases show 99": ("release 99", "ratchet releases list"),
    "releases rollback": ("--reason", NO_REASON),
    "releases hold -r x": ("http://127.0.0.1:9", "ratchet serve"),
    "releases create -r x": ("no adapter is named", "--clip"),
    "releases hold -r x --server http://far:1": ("http://far:1", "RATCHET_SERVE__OPERATOR_KEY"),
    "samples list --since yesterday": ("'yesterday'", "2026-01-31"),
    "samples show 0123": ("'0123'", "64 hex digits"),
    "samples trace somewhere": ("'somewhere'", "topic:partition:offset"),
    "samples delete --source nobody --reason x --yes": ("nothing is selected", "no deletion", "samples list"),
    "samples delete --reason x --yes": ("everything", "Name one of"),
    "samples delete --source cam": ("--reason", NO_REASON),
    "samples deletions deletion-1": ("deletion-1", "ratchet samples deletions"),
    "quarantine list --refused-for ugly": ("--refused-for", "image_undecodable"),
    "quarantine resubmit -r x": ("--refused-for", "--all"),
    "keys create ann -s admin": ("--scope", "infer"),
    "keys create Ann -s infer": ("'Ann'", "lower-case letters"),
    "keys create ann -s infer --days 0": ("0 days", "more than 0"),
    "keys revoke ann -r x": ("'ann'", "ratchet keys list"),
    "base show b16": ("'b16'", "Registered: none"),
    "base add b16 --model ViT-B-16": ("weights", "--weights"),
    "base add b16 --model ViT-B-16 --weights none.safetensors": ("none.safetensors", "--weights"),
    "publish none": ("none does not exist", "Name a file or a folder"),
    "publish empty": ("empty", "data.csv"),
    "publish data --format csw": ("csw", "webdataset"),
    f"--set kafka.bootstrap={AWAY} publish data": (AWAY, "kafka.bootstrap"),
    f"--set kafka.bootstrap={AWAY} quarantine resubmit --all -r x": (AWAY, "kafka.bootstrap"),
    "ingest skip t --to 5 -r x": ("'t'", "topic:partition"),
    "trainer abandon update-1 -r x": ("update-1", "ratchet status"),
    "adapters import none": ("none is not a directory", "save_pretrained"),
    "bench swop": ("'swop'", "Did you mean swap"),
    "admin restore none": ("none", "backup"),
    "metrics serve none": ("'folder'", "'none' does not exist"),
    "-c new.yaml init --model ViT-B-16 --yes --offline": ("--weights", "ViT-B-16"),
    "-c new.yaml init --model shipped --broker 127.0.0.1:1 --yes": ("--broker", AWAY, "--offline"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


@pytest.fixture
def installation(folder: Path) -> Path:
    Ledger.open(f"sqlite:///{folder}/.ratchet/ledger.db").close()
    SampleStore(str(folder / ".ratchet/lake")).version()
    (folder / "ratchet.yaml").write_text("serve: {port: 9, host: 127.0.0.1}\n")
    (folder / "empty").mkdir()
    (folder / "data").mkdir()
    (folder / "data" / "data.csv").write_text("file,text\nbus.png,a bus\n")
    return folder


def said(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What ``ratchet`` says before it fails, without frames and breaks of lines."""
    monkeypatch.setattr(sys, "argv", ["ratchet", *line.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    output = "\n".join(capsys.readouterr())
    assert ended.value.code not in (0, None), output
    assert "Traceback" not in output and "hunter2" not in output, output
    assert len(output.strip().splitlines()) <= MOST_LINES, output
    return re.sub(r"[\s│]+", " ", output)


@pytest.mark.parametrize("name", OF_SETTINGS)
def test_a_wrong_setting_is_named_with_its_origin(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, line, variables, words = OF_SETTINGS[name]
    (folder / "ratchet.yaml").write_text(text)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    output = said(line, monkeypatch, capsys)
    assert [word for word in words if word not in output] == [], output


@pytest.mark.parametrize("line", ELSEWHERE)
def test_in_a_folder_without_an_installation_nothing_is_made(
    line: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = said(line, monkeypatch, capsys)
    for word in (f"there is no installation at {folder}", "ratchet up", "ratchet init", "--config", "RATCHET_HOME"):
        assert word in output
    assert not list(folder.iterdir())


@pytest.mark.parametrize("line", OF_COMMANDS)
def test_a_wrong_argument_is_named_with_what_to_do(
    line: str, installation: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = said(line, monkeypatch, capsys)
    assert [word for word in OF_COMMANDS[line] if word not in output] == [], output
