from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.artifacts import Artifacts, cache
from core.artifacts.cache import HELD, Cache
from tests.unit.core.artifacts.test_artifacts import killed_child

SIZE = 1000


@pytest.fixture
def url(tmp_path: Path) -> str:
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
    while cache._held:
        os.close(cache._held.popitem()[1])


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path, url: str) -> None:
    artifacts = Artifacts(url, tmp_path / "cache", cache_bytes=3 * SIZE)
    fetched(artifacts, 0, 1, 2)
    artifacts.fetch(key(0))  # used again
    released()
    fetched(artifacts, 3)
    assert cached(artifacts) == {0, 2, 3}
    fetched(artifacts, 1)
    assert sum(path.stat().st_size for path in artifacts.cache.rglob("weights")) <= 3 * SIZE


def test_what_a_process_fetched_last_is_not_evicted_under_it(tmp_path: Path, url: str) -> None:
    artifacts = Artifacts(url, tmp_path / "cache", cache_bytes=3 * SIZE)
    fetched(artifacts, *range(24))
    assert cached(artifacts) == set(range(24 - HELD, 24))


def test_what_another_process_reads_stays_until_it_ends(tmp_path: Path, url: str) -> None:
    artifacts = Artifacts(url, tmp_path / "cache", cache_bytes=2 * SIZE)
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
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, module: object, name: str
) -> None:
    artifacts = Artifacts(url, tmp_path / "cache", cache_bytes=10 * SIZE)
    fetched(artifacts, 0, 1, 2)
    released()
    full = Cache(artifacts.cache, max_bytes=0)
    killed_child(monkeypatch, module, name, full.evict)
    fetched(Artifacts(url, tmp_path / "cache", cache_bytes=10 * SIZE), 0, 1, 2)
    released()
    assert full.evict() >= 3 * SIZE
    assert not cached(artifacts)
    assert not list(artifacts.cache.rglob(".evicted-*"))


def test_two_processes_do_not_evict_at_once(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts = Artifacts(url, tmp_path / "cache")
    fetched(artifacts, 0, 1)
    released()
    first, second = Cache(artifacts.cache, max_bytes=0), Cache(artifacts.cache, max_bytes=0)
    freed = []

    def remove_left_over(folder: Path) -> None:
        freed.append(second.evict())

    monkeypatch.setattr(cache, "_remove_left_over", remove_left_over)
    assert first.evict() == 2 * SIZE
    assert freed == [0]
