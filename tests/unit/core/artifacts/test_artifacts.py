from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from core.artifacts import Artifacts, cache, directory_digest, folder
from core.artifacts.cache import HELD, Cache
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


def test_a_directory_comes_back_and_its_key_is_never_reused(artifacts: Artifacts, tmp_path: Path, source: Path) -> None:
    for name, read in (("adapters/none", artifacts.fetch), ("reports/none.json", artifacts.read_bytes)):
        with pytest.raises(AdapterError, match=name):
            read(name)
    for _ in range(2):  # the same again is fine
        artifacts.put_directory(source, "adapters/clip-1")
    fetched = artifacts.fetch("adapters/clip-1")
    assert {p.relative_to(fetched).as_posix(): p.read_bytes() for p in fetched.rglob("*") if p.is_file()} == {
        "a.txt": b"one", "inner/b.bin": bytes(range(256)),
    }  # fmt: skip
    assert artifacts.fetch("adapters/clip-1", directory_digest(source)) == fetched
    with pytest.raises(AdapterError, match="not the one in the ledger"):
        artifacts.fetch("adapters/clip-1", "0" * 64)
    with pytest.raises(AdapterError, match="never reused"):
        artifacts.put_directory(_directory(tmp_path / "other", "two"), "adapters/clip-1")
    assert (artifacts.fetch("adapters/clip-1") / "a.txt").read_text() == "one"


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a/../../b", ""])
def test_a_key_may_not_leave_the_folder(artifacts: Artifacts, key: str) -> None:
    with pytest.raises(AdapterError):
        artifacts.write_bytes(key, b"x")


def test_a_damaged_download_is_refused_and_a_checked_copy_needs_no_store(bucket: Artifacts, source: Path) -> None:
    bucket.put_directory(source, "adapters/clip-1")
    bucket.write_bytes("adapters/clip-1/a.txt", b"tampered")
    with pytest.raises(AdapterError, match="damaged"):
        bucket.fetch("adapters/clip-1")
    bucket.write_bytes("adapters/clip-1/a.txt", b"one")
    (bucket.fetch("adapters/clip-1") / "a.txt").unlink()
    copy = bucket.fetch("adapters/clip-1")
    assert (copy / "a.txt").read_text() == "one", "it was fetched again"
    bucket.filesystem.rm(bucket.root, recursive=True)
    assert bucket.fetch("adapters/clip-1") == copy


class _Crashed(BaseException):
    """Stands for the end of the process."""


@contextmanager
def _killed_after(artifacts: Artifacts, calls: int) -> Iterator[None]:
    """The client of the object store is killed after this many changing calls."""
    store, left = artifacts._bucket.store, iter(range(calls))

    def mortal(name: str) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            if next(left, None) is None:
                raise _Crashed
            getattr(ObjectStore, name)(store, *arguments)

        return call

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Crashed):
        for name in ("upload", "write", "delete"):
            patch.setattr(store, name, mortal(name))
        yield


@pytest.mark.parametrize("calls", range(3))
def test_what_a_crash_half_stored_or_half_deleted_is_not_seen(bucket: Artifacts, source: Path, calls: int) -> None:
    with _killed_after(bucket, calls):
        bucket.put_directory(source, "adapters/clip-1")
    assert not bucket.exists("adapters/clip-1")
    with pytest.raises(AdapterError, match="is incomplete" if calls else "is not in the object store"):
        bucket.fetch("adapters/clip-1")
    bucket.put_directory(source, "adapters/clip-1")
    assert directory_digest(bucket.fetch("adapters/clip-1")) == directory_digest(source)
    with _killed_after(bucket, calls):
        bucket.delete("adapters/clip-1")
    assert bucket.exists("adapters/clip-1") == (calls == 0)
    bucket.delete("adapters/clip-1")
    assert bucket.sizes("adapters") == {}


def test_leftovers_of_an_upload_are_not_in_the_next_and_old_formats_are_read(bucket: Artifacts, source: Path) -> None:
    bucket.write_bytes("memories/clip-1/left.bin", b"left")
    bucket.put_directory(source, "memories/clip-1")
    assert directory_digest(bucket.fetch("memories/clip-1")) == directory_digest(source)
    bucket.put_directory(source, "adapters/clip-1")
    # Before there were manifests, the marker of a complete upload had its digest alone.
    bucket.write_bytes("adapters/clip-1/.complete", directory_digest(source).encode())
    assert directory_digest(bucket.fetch("adapters/clip-1")) == directory_digest(source)
    bucket.put_directory(source, "adapters/clip-1")


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


@pytest.mark.parametrize(
    ("stores", "module", "name", "seen"),
    [
        (True, shutil, "copytree", False), (True, folder, "flush", False), (True, Path, "rename", False),
        (False, Path, "rename", True), (False, folder, "flush", False), (False, shutil, "rmtree", False),
    ],
)  # fmt: skip
def test_what_a_process_half_stored_or_half_deleted_when_it_was_killed_is_not_seen(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, stores: bool, module: object, name: str, seen: bool
) -> None:
    artifacts = Artifacts(str(tmp_path / "store"))
    if not stores:
        artifacts.put_directory(source, "adapters/clip-1")
    work = partial(artifacts.put_directory, source) if stores else artifacts.delete
    killed_child(monkeypatch, module, name, lambda: work("adapters/clip-1"))
    assert artifacts.exists("adapters/clip-1") == seen
    if stores:
        artifacts.put_directory(source, "adapters/clip-1")
        assert directory_digest(artifacts.fetch("adapters/clip-1")) == directory_digest(source)
    else:
        artifacts.delete("adapters/clip-1")
        assert artifacts.sizes("adapters") == {}


def test_what_a_killed_process_left_is_deleted_when_it_is_old(tmp_path: Path, source: Path) -> None:
    artifacts = Artifacts(str(tmp_path / "store"))
    young, old = (tmp_path / "store" / "adapters" / f".staging-{name}" for name in ("young", "old"))
    for path in (young, old):
        _directory(path)
    os.utime(old, (0, 0))
    artifacts.put_directory(source, "adapters/clip-1")
    assert young.exists() and not old.exists()


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


SIZE = 1000


@pytest.fixture
def stored(tmp_path: Path) -> str:
    """An object store with twenty-four directories of 1,000 bytes."""
    made = f"memory://{tmp_path.name}"
    for number in range(24):
        source = tmp_path / f"source-{number}"
        source.mkdir()
        (source / "weights").write_bytes(bytes([number]) * SIZE)
        Artifacts(made, tmp_path / "other").put_directory(source, key(number))
    return made


def key(number: int) -> str:
    return f"adapters/clip-{number:02}"


def fetched(artifacts: Artifacts, *numbers: int) -> None:
    for number in numbers:
        path = artifacts.fetch(key(number))
        assert (path / "weights").read_bytes() == bytes([number]) * SIZE
        os.utime(artifacts._bucket.cache._note(key(number)), (number, number))  # the order of use


def cached(artifacts: Artifacts) -> set[int]:
    return {int(path.name[-2:]) for path in (artifacts.cache / "adapters").glob("clip-*")}


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    yield
    released()


def released() -> None:
    """Hold no directory of the cache any more, as another process."""
    while cache._held:
        os.close(cache._held.popitem()[1])


def test_what_was_not_used_for_longest_is_evicted_but_not_what_was_just_fetched(tmp_path: Path, stored: str) -> None:
    artifacts = Artifacts(stored, tmp_path / "cache", cache_bytes=3 * SIZE)
    fetched(artifacts, 0, 1, 2)
    artifacts.fetch(key(0))  # used again
    released()
    fetched(artifacts, 3)
    assert cached(artifacts) == {0, 2, 3}
    fetched(artifacts, 1)
    assert sum(path.stat().st_size for path in artifacts.cache.rglob("weights")) <= 3 * SIZE
    fetched(artifacts, *range(24))
    assert cached(artifacts) == set(range(24 - HELD, 24))


def test_what_another_process_reads_stays_until_it_ends(tmp_path: Path, stored: str) -> None:
    artifacts = Artifacts(stored, tmp_path / "cache", cache_bytes=2 * SIZE)
    fetched(artifacts, 0)
    released()
    code = f"""
        import sys
        from pathlib import Path
        from core.artifacts.cache import Cache
        Cache(Path({str(artifacts.cache)!r})).hold({key(0)!r})
        print("holds", flush=True)
        sys.stdin.read()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "holds\n"
        fetched(artifacts, 1, 2)
        released()
        fetched(artifacts, 3)
        assert 0 in cached(artifacts)
        reader.kill()
    released()
    fetched(artifacts, 4)
    assert 0 not in cached(artifacts)


@pytest.mark.parametrize(("module", "name"), [(Path, "rename"), (Path, "unlink"), (shutil, "rmtree")])
def test_an_eviction_that_a_kill_ends_anywhere_leaves_whole_entries_or_none(
    tmp_path: Path, stored: str, monkeypatch: pytest.MonkeyPatch, module: object, name: str
) -> None:
    artifacts = Artifacts(stored, tmp_path / "cache", cache_bytes=10 * SIZE)
    fetched(artifacts, 0, 1, 2)
    released()
    full = Cache(artifacts.cache, max_bytes=0)
    killed_child(monkeypatch, module, name, full.evict)
    fetched(Artifacts(stored, tmp_path / "cache", cache_bytes=10 * SIZE), 0, 1, 2)
    released()
    assert full.evict() >= 3 * SIZE
    assert not cached(artifacts)
    assert not list(artifacts.cache.rglob(".evicted-*"))


def test_two_processes_do_not_evict_at_once(tmp_path: Path, stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts = Artifacts(stored, tmp_path / "cache")
    fetched(artifacts, 0, 1)
    released()
    first, second = Cache(artifacts.cache, max_bytes=0), Cache(artifacts.cache, max_bytes=0)
    freed: list[int] = []
    monkeypatch.setattr(cache, "_remove_left_over", lambda _: freed.append(second.evict()))
    assert first.evict() == 2 * SIZE
    assert freed == [0]
