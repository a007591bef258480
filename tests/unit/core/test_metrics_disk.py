from __future__ import annotations

import errno
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from prometheus_client.mmap_dict import MmapedDict

from benchmarks.stream.small_disk import SmallDisk
from core.metrics.exposition import AllocatedDict

ROOT = Path(__file__).parents[3]
PROCESS = """
import gc, sys
from core import metrics
from core.metrics.exposition import AllocatedDict
metrics.http.in_flight(3)
print("counts", flush=True)
sys.stdin.readline()
for number in range(2000):  # more labels than the first block of a file holds
    metrics.http.request(f"/v1/{number}", 200, 0.1)
print("counts more", flush=True)
sys.stdin.readline()
for each in gc.get_objects():
    if isinstance(each, AllocatedDict):
        each._retry_at = 0.0  # as if the time until the next try had passed
metrics.http.request("/v1/x", 200, 0.1)
print(metrics.exposition("serve").decode(), flush=True)
"""


def _exported(path: Path) -> dict[str, float]:
    return {key: value for key, value, _, _ in MmapedDict.read_all_values_from_file(str(path))}  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("full_from_the_start", [True, False])
def test_a_process_goes_on_when_the_disk_of_its_metrics_is_full(tmp_path: Path, full_from_the_start: bool) -> None:
    with SmallDisk(tmp_path / "metrics", size=4 << 20) as disk:
        if not disk.mounted:
            pytest.skip("no file system can be mounted here")
        environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(disk.folder), "PYTHONPATH": str(ROOT)}
        if full_from_the_start:
            disk.fill()
        process = subprocess.Popen(
            [sys.executable, "-c", PROCESS], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "counts\n"
        disk.fill()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "counts more\n"
        disk.free()
        page, _ = process.communicate("\n")
    assert process.returncode == 0
    assert 'ratchet_http_requests_total{route="/v1/x",status="200"} 1.0' in page


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the disk is full; the first element can be changed."""
    state, allocate = [True], os.posix_fallocate

    def fallocate(descriptor: int, offset: int, size: int) -> None:
        if state[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    monkeypatch.setattr(import_module("core.metrics.exposition"), "RETRY_SECONDS", 0.0)  # not its function
    return state


def test_values_wait_in_memory_while_there_is_no_room_for_a_file(tmp_path: Path, full: list[bool]) -> None:
    path = tmp_path / "counter_1.db"
    counts = AllocatedDict(str(path))
    counts.write_value("a", 2.0, 0.0)
    assert counts.read_value("a") == (2.0, 0.0) and counts.read_value("b") == (0.0, 0.0)
    assert not path.exists(), "readers cannot read an empty file"
    full[0] = False
    counts.write_value("a", 3.0, 0.0)
    assert _exported(path) == {"a": 3.0}
    counts.close()  # type: ignore[no-untyped-call]


def test_what_is_in_the_file_stays_exported_while_it_cannot_grow(tmp_path: Path, full: list[bool]) -> None:
    full[0] = False
    path = tmp_path / "counter_1.db"
    counts = AllocatedDict(str(path))
    counts.write_value("a", 1.0, 0.0)
    full[0] = True
    long = "b" * (1 << 17)
    counts.write_value(long, 5.0, 0.0)
    counts.write_value("a", 2.0, 0.0)
    assert _exported(path) == {"a": 2.0} and counts.read_value(long) == (5.0, 0.0)
    full[0] = False
    counts.write_value(long, 6.0, 0.0)
    assert _exported(path) == {"a": 2.0, long: 6.0}
    counts.close()  # type: ignore[no-untyped-call]


def test_a_folder_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    counts = AllocatedDict(str(tmp_path / "none" / "counter_1.db"))
    counts.write_value("a", 2.0, 0.0)
    assert counts.read_value("a") == (2.0, 0.0)
    counts.close()  # type: ignore[no-untyped-call]
