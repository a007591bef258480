"""Every place states the same version. The wheel is the whole product, in an empty folder, without a clone."""

from __future__ import annotations

import runpy
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.support.wheels import ROOT, build, environment, install_beside

pytestmark = pytest.mark.timeout(900)
PACKAGES = ("core", "demo", "ops", "serving", "streams", "updater")

# `--help` of each command, then each module, then the first steps; in one process: torch and Ray import for seconds.
# What only extras or tests bring may be missing, anything of a clone may not.
USE_ALL = """
import importlib, pkgutil, sys
import typer
from typer.testing import CliRunner
from ops.cli.main import app
def walk(command, *words):
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0, (words, result.output, result.exception)
    print("command", *words)
    for name, child in getattr(command, "commands", {}).items():
        walk(child, *words, name)
walk(typer.main.get_command(app))
for package in sys.argv[1:]:
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if found.name.split(".")[-1] in ("env", "__main__") or ".versions." in found.name:
            continue  # these run when they are imported: Alembic's, and commands
        try:
            importlib.import_module(found.name)
        except ImportError as error:
            print("missing", found.name, error.name)
for words in (["init", "--yes"], ["doctor"], ["base", "build"]):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, (words, result.output, result.exception)
    print("step", *words)
"""


def run(folder: Path, *words: str | Path) -> str:
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_every_place_states_the_same_version() -> None:
    stated = runpy.run_path(str(ROOT / "release.py"))["stated"](ROOT)
    assert {"pyproject.toml", "helm/ratchet/Chart.yaml"} <= stated.keys()
    assert all(stated.values())
    assert len({version for found in stated.values() for version in found}) == 1, stated
    assert len(stated["helm/ratchet/Chart.yaml"]) == 2


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return build(tmp_path_factory.mktemp("wheels"))


def test_the_wheel_has_each_file_of_its_packages_and_no_other(built: list[Path]) -> None:
    (server,) = [path for path in built if path.name.startswith("ratchet_server-")]
    inside = {name for name in zipfile.ZipFile(server).namelist() if ".dist-info/" not in name}
    tree = {path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()}
    assert inside == {str(path.relative_to(ROOT)) for path in tree if "__pycache__" not in path.parts}
    assert server.stat().st_size < 12_000_000


@pytest.mark.long
def test_no_command_and_no_module_needs_a_clone_and_the_first_steps_work_in_an_empty_folder(
    built: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an environment that has the wheels and, from this environment, the packages of extra local."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert install_beside(tmp_path / "environment", built, "local") == ""
    commands, empty = tmp_path / "environment" / "bin", tmp_path / "empty"
    empty.mkdir()
    assert "Usage: ratchet" in run(empty, commands / "ratchet", "--help")
    lines = [line.split(" ", 1) for line in run(empty, commands / "python", "-c", USE_ALL, *PACKAGES).splitlines()]
    helped = {rest[0] for kind, *rest in lines if kind == "command" and rest}
    assert {"demo", "up", "serve", "base add", "ingest"} <= helped
    missing = dict(rest[0].split() for kind, *rest in lines if kind == "missing")
    ours = {"tests", "docs", "helm", "examples", "install", "release", "benchmarks", "None", *PACKAGES}
    assert not {module: name for module, name in missing.items() if name.split(".")[0] in ours}
    assert not {module: name for module, name in missing.items() if module.startswith(("ops.cli", "ops.console"))}
    assert [rest[0] for kind, *rest in lines if kind == "step"] == ["init --yes", "doctor", "base build"]
    assert (empty / "ratchet.yaml").exists()
    assert [*(empty / ".ratchet" / "bases").iterdir()]
