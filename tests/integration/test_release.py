"""One command makes a release of a clean tree, and leaves nothing behind if it fails."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.wheels import NOT_SOURCE, ROOT, environment

pytestmark = pytest.mark.integration


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


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


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
