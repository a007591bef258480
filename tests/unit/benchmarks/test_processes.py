from __future__ import annotations

import os
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import soak
from benchmarks.bench_home import bench_home, clip_base
from benchmarks.line_worker import ROOT
from benchmarks.process_memory import ProcessMemory, child_processes, memory_growth
from benchmarks.soak import MemoryLog, violations
from core.errors import ConfigError
from core.loading import load_settings
from core.settings import Settings
from tests.support.tiny import tiny_base

WORKER = """
import threading
from benchmarks.line_worker import answer, questions

for question in questions():
    answer({"twice": 2 * question["number"]})
    if question["number"] == 0:
        threading.Event().wait()
"""


def test_a_worker_that_is_computing_ends_with_its_parent() -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write('{"number": 0}\n')
    worker.stdin.flush()
    assert worker.stdout.readline() == '{"twice": 0}\n'  # and now it does something endless
    worker.stdin.close()  # as the death of the parent does
    assert worker.wait(30) == 0


HOLD = "import sys; held = bytearray(b'x') * (64 << 20); print(flush=True); sys.stdin.read()"
MAP = """
import mmap, sys
with open({path!r}, "rb") as file:
    held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sum(held[::4096]), print(flush=True), sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_child_holds_its_own_pages_and_not_libraries_that_another_process_uses_too(tmp_path: Path) -> None:
    """The catalog seemed to have grown by 8% because tests that had mapped the same libraries had ended."""
    (tmp_path / "library").write_bytes(b"x" * (64 << 20))
    mapped = MAP.format(path=str(tmp_path / "library"))
    commands = [*([sys.executable, "-c", code] for code in (HOLD, mapped)), ["sh", "-c", "echo; sleep 60"]]
    children = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for command in commands]
    try:
        assert [child.stdout.readline() for child in children] == [b"\n"] * 3
        seen = child_processes()
    finally:
        for child in children:
            child.kill()
            child.wait()
    large, mapping, small = (seen[child.pid] for child in children)
    assert 64 << 20 <= large.size < 128 << 20 and not large.is_small
    assert mapping.is_small and small.is_small and os.getpid() not in seen


def memory(name: str, size: int) -> ProcessMemory:
    return ProcessMemory(name, size << 20)


def test_growth_is_of_processes_that_lived_through_both_looks() -> None:
    before = {1: memory("encoder", 100), 2: memory("ingress", 100), 3: memory("gone", 100), 5: memory("sh", 1)}
    after = {1: memory("encoder", 104), 2: memory("ingress", 120), 4: memory("new", 100), 5: memory("sh", 2)}
    assert list(memory_growth(before, after).items()) == [("ingress 2", 1.2), ("encoder 1", 1.04)]


def log_of(sizes: dict[int, list[int]]) -> MemoryLog:
    """A snapshot each 20 s, sizes in MiB; 0 for a missing process."""
    log = MemoryLog()
    for number in range(len(next(iter(sizes.values())))):
        there = {pid: row[number] << 20 for pid, row in sizes.items() if row[number]}
        log.add(20.0 * number, {pid: ProcessMemory("p", size) for pid, size in there.items()})
    return log


@pytest.mark.parametrize(("sizes", "warm_seconds", "growth", "ended"), [
    # Not what one snapshot shows: nine in ten are as they were, though the last of all has nine times as much.
    ({1: [10, 50, *[100] * 9, 900], 2: [10, 50, *range(100, 110)]}, 40, {"p 2": 1.09, "p 1": 1.0}, []),
    ({1: [50, 50, 50, 50], 2: [50, 50, 50, 0], 3: [50, 0, 0, 0], 4: [0, 0, 0, 50]}, 20, {"p 1": 1.0}, ["p 2"]),
    ({1: [5, 5, 5, 9], 2: [5, 5, 5, 0]}, 20, {}, []),
    # A raylet of 16 MiB had a page less in the last snapshot, and was said to have ended.
    ({1: [17, 17, 17, 15]}, 20, None, []),
], ids=["trend after the warm-up", "ended after the warm-up", "small ones", "one that became small"])  # fmt: skip
def test_growth_and_ends_count_from_the_warm_up_on(
    sizes: dict[int, list[int]], warm_seconds: int, growth: dict[str, float] | None, ended: list[str]
) -> None:
    log = log_of(sizes)
    assert log.ended(warm_seconds=warm_seconds) == ended
    assert growth is None or log.growth(warm_seconds=warm_seconds) == growth


def test_a_snapshot_is_the_lowest_reading_of_those_that_are_still_there(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([{1: 900, 2: 50, 3: 7}, {1: 800, 2: 60, 3: 7}, {1: 850, 2: 70, 4: 9, 5: 1}])
    clock = count(1)
    monkeypatch.setattr(soak, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None))
    monkeypatch.setattr(soak, "session_pids", lambda settings: [1, 2, 3, 4])
    monkeypatch.setattr(
        soak, "child_processes", lambda root: {pid: ProcessMemory("p", size) for pid, size in next(readings).items()}
    )
    lowest = soak.lowest_memory(Settings(), until=3)
    assert {pid: memory.size for pid, memory in lowest.items()} == {1: 800, 2: 50, 4: 9}


def test_a_run_fails_by_what_grew_failed_or_mixed() -> None:
    fine = {"failed": 0, "mixed": 0, "processes_ended": [], "memory_growth": 1.019}
    assert violations(fine) == []
    for name, value in {"failed": 1, "mixed": 2, "processes_ended": ["p 1"]}.items():
        assert violations(fine | {name: value}) == [f"{name} {value}"]
    for growth in (1.02, None):
        assert violations(fine | {"memory_growth": growth}) == [f"memory_growth {growth}"]


def test_a_home_of_a_run_has_the_base_that_is_asked_for_and_no_guard(tmp_path: Path) -> None:
    tiny_base(tmp_path / "home")
    overrides = {"home": tmp_path / "home", "base.clip": "tiny", "base.vlm": ""}
    settings = load_settings(overrides=overrides, environ={})
    ours = bench_home(settings, tmp_path / "run", clip_base(settings, "tiny"), encoder_replicas=3)
    assert clip_base(ours, "tiny").digest == clip_base(settings, "tiny").digest
    assert (ours.home, ours.serve.encoder_replicas, ours.rollout.guard_seconds) == (tmp_path / "run", 3, 0)
    assert settings.rollout.guard_seconds > 0
    with pytest.raises(ConfigError, match="no base 'ViT-Z'"):
        clip_base(settings, "ViT-Z")
