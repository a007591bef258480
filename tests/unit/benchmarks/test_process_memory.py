"""Memory of the processes of a server, as the swap benchmark compares it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.process_memory import ProcessMemory, child_processes, memory_growth

HOLD = "import sys; held = bytearray(b'x') * {bytes}; print(flush=True); sys.stdin.read()"
MAP = """
import mmap, sys
with open({path!r}, "rb") as file:
    held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sum(held[::4096]), print(flush=True), sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_child_holds_is_seen_and_a_small_one_is_called_so() -> None:
    large = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(bytes=64 << 20)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    small = subprocess.Popen(["sleep", "60"])
    try:
        assert large.stdout is not None
        large.stdout.readline()
        seen = child_processes()
        assert 64 << 20 <= seen[large.pid].size < 128 << 20
        assert not seen[large.pid].is_small and seen[small.pid].is_small and os.getpid() not in seen
    finally:
        for process in (large, small):
            process.kill()
            process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_libraries_that_another_process_uses_too_are_no_memory(tmp_path: Path) -> None:
    """The catalog had grown by 8%: tests that had the same libraries mapped had ended meanwhile."""
    (tmp_path / "library").write_bytes(b"x" * (64 << 20))
    child = subprocess.Popen(
        [sys.executable, "-c", MAP.format(path=str(tmp_path / "library"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"\n"
        assert child_processes()[child.pid].is_small
    finally:
        child.kill()
        child.wait()


def memory(name: str, size: int) -> ProcessMemory:
    return ProcessMemory(name, size << 20)


def test_growth_is_of_processes_that_lived_through_both_looks() -> None:
    before = {1: memory("encoder", 100), 2: memory("ingress", 100), 3: memory("gone", 100), 5: memory("sh", 1)}
    after = {1: memory("encoder", 104), 2: memory("ingress", 120), 4: memory("new", 100), 5: memory("sh", 2)}
    assert list(memory_growth(before, after).items()) == [("ingress 2", 1.2), ("encoder 1", 1.04)]
