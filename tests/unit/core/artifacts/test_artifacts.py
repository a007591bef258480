from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from core.artifacts import Artifacts, directory_digest, folder
from core.artifacts.folder import Manifest
from core.artifacts.object_store import ObjectStore
from core.errors import AdapterError


def _directory(path: Path, text: str = "one") -> Path:
    (path / "inner").mkdir(parents=True)
    (path / "a.txt").write_text(text)
    (path / "inner" / "b.bin").write_bytes(bytes(range(256)))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return _directory(tmp_path / "source")


@pytest.fixture
def bucket(tmp_path: Path) -> Artifacts:
    return Artifacts(f"memory://{tmp_path.name}", cache=tmp_path / "cache")


@pytest.fixture(params=["folder", "memory"])
def artifacts(request: pytest.FixtureRequest, tmp_path: Path) -> Artifacts:
    url = str(tmp_path / "store") if request.param == "folder" else f"memory://{tmp_path.name}"
    return Artifacts(url, cache=tmp_path / "cache")


def test_a_directory_comes_back_as_it_was(artifacts: Artifacts, source: Path) -> None:
    artifacts.put_directory(source, "adapters/clip-1")
    fetched = artifacts.fetch("adapters/clip-1")
    assert {p.relative_to(fetched).as_posix(): p.read_bytes() for p in fetched.rglob("*") if p.is_file()} == {
        "a.txt": b"one", "inner/b.bin": bytes(range(256)),
    }  # fmt: skip
    assert artifacts.fetch("adapters/clip-1", directory_digest(source)) == fetched
    with pytest.raises(AdapterError, match="not the one in the ledger"):
        artifacts.fetch("adapters/clip-1", "0" * 64)


def test_storing_the_same_again_is_fine_and_other_contents_are_refused(
    artifacts: Artifacts, tmp_path: Path, source: Path
) -> None:
    artifacts.put_directory(source, "adapters/clip-1")
    artifacts.put_directory(source, "adapters/clip-1")
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


def test_a_damaged_download_is_refused(bucket: Artifacts, source: Path) -> None:
    bucket.put_directory(source, "adapters/clip-1")
    bucket.write_bytes("adapters/clip-1/a.txt", b"tampered")
    with pytest.raises(AdapterError, match="damaged"):
        bucket.fetch("adapters/clip-1")


class _Crashed(BaseException):
    """Stands for the end of the process."""


class _Mortal(ObjectStore):
    """An object store whose client is killed after this many changing calls."""

    def __init__(self, store: ObjectStore, calls: int) -> None:
        super().__init__(store.filesystem)
        self.calls = calls

    def upload(self, source: Path, path: str) -> None:
        self._live()
        super().upload(source, path)

    def write(self, path: str, data: bytes) -> None:
        self._live()
        super().write(path, data)

    def delete(self, path: str) -> None:
        self._live()
        super().delete(path)

    def _live(self) -> None:
        if self.calls == 0:
            raise _Crashed
        self.calls -= 1


@contextmanager
def _killed_after(artifacts: Artifacts, calls: int) -> Iterator[None]:
    whole = artifacts._bucket.store
    artifacts._bucket.store = _Mortal(whole, calls)
    with pytest.raises(_Crashed):
        yield
    artifacts._bucket.store = whole


@pytest.mark.parametrize("writes", range(3))
def test_an_upload_that_a_crash_ends_anywhere_is_not_read_and_can_be_repeated(
    bucket: Artifacts, source: Path, writes: int
) -> None:
    with _killed_after(bucket, writes):
        bucket.put_directory(source, "adapters/clip-1")
    assert not bucket.exists("adapters/clip-1")
    with pytest.raises(AdapterError, match="is incomplete" if writes else "is not in the object store"):
        bucket.fetch("adapters/clip-1")
    bucket.put_directory(source, "adapters/clip-1")
    assert directory_digest(bucket.fetch("adapters/clip-1")) == directory_digest(source)


def test_files_that_an_interrupted_upload_of_other_contents_has_left_are_no_part_of_the_next(
    bucket: Artifacts, source: Path
) -> None:
    bucket.write_bytes("memories/clip-1/left.bin", b"left")
    bucket.put_directory(source, "memories/clip-1")
    assert directory_digest(bucket.fetch("memories/clip-1")) == directory_digest(source)


def killed_child(patch: pytest.MonkeyPatch, module: object, name: str, work: Callable[[], object]) -> None:
    """Run a function in a child process that exits without any clean-up where it calls ``module.name``."""
    child = os.fork()
    if child == 0:
        patch.setattr(module, name, lambda *_, **__: os._exit(9))
        try:
            work()
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] >> 8 == 9, "it should have been killed"


@pytest.mark.parametrize(("module", "name"), [(shutil, "copytree"), (folder, "flush"), (Path, "rename")])
def test_a_process_that_is_killed_while_it_stores_leaves_nothing_that_readers_see(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, module: object, name: str
) -> None:
    artifacts = Artifacts(str(tmp_path / "store"))
    killed_child(monkeypatch, module, name, lambda: artifacts.put_directory(source, "adapters/clip-1"))
    assert not artifacts.exists("adapters/clip-1")
    artifacts.put_directory(source, "adapters/clip-1")
    assert directory_digest(artifacts.fetch("adapters/clip-1")) == directory_digest(source)


def test_what_a_killed_process_left_is_deleted_when_it_is_old(tmp_path: Path, source: Path) -> None:
    artifacts = Artifacts(str(tmp_path / "store"))
    young, old = (tmp_path / "store" / "adapters" / f".staging-{name}" for name in ("young", "old"))
    for path in (young, old):
        _directory(path)
    os.utime(old, (0, 0))
    artifacts.put_directory(source, "adapters/clip-1")
    assert young.exists() and not old.exists()


def test_a_copy_that_was_checked_once_needs_no_object_store(bucket: Artifacts, source: Path) -> None:
    bucket.put_directory(source, "adapters/clip-1")
    copy = bucket.fetch("adapters/clip-1")
    bucket.filesystem.rm(bucket.root, recursive=True)
    assert bucket.fetch("adapters/clip-1") == copy


def test_a_copy_from_which_files_have_vanished_is_fetched_again(bucket: Artifacts, source: Path) -> None:
    bucket.put_directory(source, "adapters/clip-1")
    (bucket.fetch("adapters/clip-1") / "a.txt").unlink()
    assert (bucket.fetch("adapters/clip-1") / "a.txt").read_text() == "one"


def test_uploads_of_before_there_were_manifests_are_read(bucket: Artifacts, source: Path) -> None:
    bucket.put_directory(source, "adapters/clip-1")
    bucket.write_bytes("adapters/clip-1/.complete", directory_digest(source).encode())
    assert directory_digest(bucket.fetch("adapters/clip-1")) == directory_digest(source)
    bucket.put_directory(source, "adapters/clip-1")


@pytest.mark.parametrize(
    "files", [{"../x": 1}, {"/etc/x": 1}, {"": 1}, {"a": -1}, {"a": "1"}, {"a": True}, ["a"], None, {"a/../../b": 1}]
)
def test_a_manifest_that_leaves_its_directory_or_is_none_is_refused(files: object) -> None:
    with pytest.raises(AdapterError, match="manifest of artifact 'k' is damaged"):
        Manifest.parse(json.dumps({"digest": "0" * 64, "files": files}).encode(), "k")


def test_what_is_deleted_is_gone_and_may_be_stored_again(artifacts: Artifacts, source: Path) -> None:
    artifacts.put_directory(source, "memories/clip-1")
    artifacts.write_bytes("reports/u/report.json", b"{}")
    assert artifacts.sizes("memories").keys() == {"clip-1"}
    assert artifacts.read_bytes("reports/u/report.json") == b"{}"
    assert artifacts.sizes("reports") == {"u": 2}
    assert artifacts.sizes("none") == {}
    for _ in range(2):
        artifacts.delete("memories/clip-1")
        artifacts.delete("reports/u/report.json")
        assert not artifacts.exists("memories/clip-1")
        assert artifacts.sizes("memories") == {}
    artifacts.put_directory(source, "memories/clip-1")
    assert directory_digest(artifacts.fetch("memories/clip-1")) == directory_digest(source)


@pytest.mark.parametrize("deletions", range(3))
def test_a_directory_that_is_half_deleted_is_never_seen_as_complete(
    bucket: Artifacts, source: Path, deletions: int
) -> None:
    bucket.put_directory(source, "adapters/clip-1")
    with _killed_after(bucket, deletions):
        bucket.delete("adapters/clip-1")
    assert bucket.exists("adapters/clip-1") == (deletions == 0)
    bucket.delete("adapters/clip-1")
    assert bucket.sizes("adapters") == {}


@pytest.mark.parametrize(("module", "name"), [(Path, "rename"), (folder, "flush"), (shutil, "rmtree")])
def test_a_folder_that_a_kill_leaves_half_deleted_is_not_seen(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, module: object, name: str
) -> None:
    artifacts = Artifacts(str(tmp_path / "store"))
    artifacts.put_directory(source, "adapters/clip-1")
    killed_child(monkeypatch, module, name, lambda: artifacts.delete("adapters/clip-1"))
    assert artifacts.exists("adapters/clip-1") == (name == "rename")
    artifacts.delete("adapters/clip-1")
    assert artifacts.sizes("adapters") == {}
