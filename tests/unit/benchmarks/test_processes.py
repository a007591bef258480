from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bench_home import bench_home, clip_base
from benchmarks.line_worker import ROOT
from benchmarks.process_memory import child_processes
from benchmarks.soak import violations
from core.errors import ConfigError
from core.loading import load_settings
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
