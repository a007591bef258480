"""Artifacts are immutable, whole, and the same on a folder and on an object store."""

from __future__ import annotations

from pathlib import Path

import pytest

from ops.artifacts import Artifacts
from ops.errors import AdapterError


def _directory(path: Path, text: str = "one") -> Path:
    (path / "inner").mkdir(parents=True)
    (path / "a.txt").write_text(text)
    (path / "inner" / "b.bin").write_bytes(bytes(range(256)))
    return path


@pytest.fixture(params=["folder", "memory"])
def artifacts(request: pytest.FixtureRequest, tmp_path: Path) -> Artifacts:
    url = str(tmp_path / "store") if request.param == "folder" else f"memory://{tmp_path.name}"
    return Artifacts(url, cache=tmp_path / "cache")


def test_a_directory_comes_back_as_it_was(artifacts: Artifacts, tmp_path: Path) -> None:
    artifacts.put_directory(_directory(tmp_path / "source"), "adapters/clip-1")
    fetched = artifacts.fetch("adapters/clip-1")
    assert (fetched / "a.txt").read_text() == "one"
    assert (fetched / "inner" / "b.bin").read_bytes() == bytes(range(256))
    assert sorted(p.name for p in fetched.rglob("*")) == ["a.txt", "b.bin", "inner"]


def test_storing_the_same_again_is_fine_and_other_contents_are_refused(artifacts: Artifacts, tmp_path: Path) -> None:
    artifacts.put_directory(_directory(tmp_path / "source"), "adapters/clip-1")
    artifacts.put_directory(tmp_path / "source", "adapters/clip-1")
    with pytest.raises(AdapterError, match="never reused"):
        artifacts.put_directory(_directory(tmp_path / "other", "two"), "adapters/clip-1")
    assert (artifacts.fetch("adapters/clip-1") / "a.txt").read_text() == "one"


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a/../../b", ""])
def test_a_key_may_not_leave_the_folder(artifacts: Artifacts, key: str) -> None:
    with pytest.raises(AdapterError):
        artifacts.write_bytes(key, b"x")


def test_what_is_not_there_is_a_clear_error(artifacts: Artifacts) -> None:
    with pytest.raises(AdapterError, match="adapters/none"):
        artifacts.fetch("adapters/none")
    with pytest.raises(AdapterError, match=r"reports/none\.json"):
        artifacts.read_bytes("reports/none.json")


def test_bytes_come_back(artifacts: Artifacts) -> None:
    artifacts.write_bytes("reports/1/report.json", b"{}")
    assert artifacts.read_bytes("reports/1/report.json") == b"{}"
    assert artifacts.exists("reports/1/report.json")


def test_a_damaged_download_is_refused(tmp_path: Path) -> None:
    artifacts = Artifacts(f"memory://{tmp_path.name}", cache=tmp_path / "cache")
    artifacts.put_directory(_directory(tmp_path / "source"), "adapters/clip-1")
    artifacts.write_bytes("adapters/clip-1/a.txt", b"tampered")
    with pytest.raises(AdapterError, match="damaged"):
        artifacts.fetch("adapters/clip-1")
