"""One command makes a release of a clean tree, and leaves nothing behind if it fails. The wheel is the whole product,
in an empty folder, without a clone.
"""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.wheels import NOT_SOURCE, ROOT, build, environment, install_beside

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


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "clone"
    shutil.copytree(ROOT, folder, ignore=NOT_SOURCE)
    shutil.copytree(ROOT / "helm", folder / "helm")
    shutil.copy(ROOT / ".gitignore", folder)
    git(folder, "init", "--quiet")
    git(folder, "config", "user.name", "Test")
    git(folder, "config", "user.email", "test@example.com")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "All")
    return folder


def run(folder: Path, *words: str | Path) -> str:
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def git(folder: Path, *words: str) -> str:
    return run(folder, "git", *words)


def release(folder: Path, version: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "release.py", version]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)


def test_every_place_states_the_same_version() -> None:
    stated = runpy.run_path(str(ROOT / "release.py"))["stated"](ROOT)
    assert {"pyproject.toml", "helm/ratchet/Chart.yaml"} <= stated.keys()
    assert all(stated.values())
    assert len({version for found in stated.values() for version in found}) == 1, stated
    assert len(stated["helm/ratchet/Chart.yaml"]) == 2


@pytest.mark.long
def test_a_release_is_built_from_its_commit_and_tagged(clone: Path) -> None:
    done = release(clone, "7.8.9")
    assert done.returncode == 0, done.stdout + done.stderr
    assert git(clone, "describe", "--tags") == "v7.8.9"
    assert git(clone, "status", "--porcelain") == ""
    assert "uv publish dist/7.8.9/" in done.stdout
    stated = runpy.run_path(str(clone / "release.py"))["stated"](clone)
    assert {version for found in stated.values() for version in found} == {"7.8.9"}
    changelog = (clone / "CHANGELOG.md").read_text()
    assert changelog.index("## Unreleased\n\n## 7.8.9 (") < changelog.index("### Serving")
    (wheel,) = (clone / "dist" / "7.8.9").glob("ratchet_server-*.whl")
    assert "\nVersion: 7.8.9\n" in zipfile.ZipFile(wheel).read("ratchet_server-7.8.9.dist-info/METADATA").decode()
    again = release(clone, "7.8.9")
    assert "v7.8.9 is there already" in again.stderr
    assert "nothing under '## Unreleased'" in release(clone, "7.9.0").stderr
    assert git(clone, "status", "--porcelain") == ""


def test_a_version_that_cannot_be_and_a_tree_with_changes_are_refused(clone: Path) -> None:
    for version, said in (("0.0.1", "older"), ("1.0", "no version"), ("v1.0.0", "no version")):
        assert said in release(clone, version).stderr, version
    (clone / "ops" / "new.py").touch()
    assert "ops/new.py" in release(clone, "7.8.9").stderr
    assert git(clone, "log", "--format=%s") == "All"


@pytest.mark.long
def test_a_release_that_cannot_be_built_is_taken_back(clone: Path) -> None:
    (clone / "README.md").unlink()  # the long description of the package
    git(clone, "commit", "--quiet", "--all", "--message", "No page")
    assert release(clone, "7.8.9").returncode != 0
    assert git(clone, "log", "-1", "--format=%s") == "No page"
    assert (git(clone, "status", "--porcelain"), git(clone, "tag")) == ("", "")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return build(tmp_path_factory.mktemp("wheels"))


def test_the_wheel_has_each_file_of_its_packages_and_no_other(built: list[Path]) -> None:
    (server,) = [path for path in built if path.name.startswith("ratchet_server-")]
    inside = {name for name in zipfile.ZipFile(server).namelist() if ".dist-info/" not in name}
    tree = {path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()}
    assert inside == {str(path.relative_to(ROOT)) for path in tree if "__pycache__" not in path.parts}
    assert server.stat().st_size < 12_000_000


def test_the_source_distribution_builds_the_same_wheel(built: list[Path]) -> None:
    """uv makes the wheel from the source distribution, which contains licence and notice."""
    for wheel in built:
        assert wheel.with_name(wheel.name.removesuffix("-py3-none-any.whl") + ".tar.gz").exists()
        names = [Path(name).name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/licenses/" in name]
        assert "LICENSE" in names


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
