"""A worker process of a benchmark: what is left of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.line_worker import ROOT

WORKER = """
import threading
from benchmarks.line_worker import answer, questions

for question in questions():
    answer({"twice": 2 * question["number"]})
    if question["number"] == 0:
        threading.Event().wait()
"""


def test_a_worker_that_is_computing_ends_with_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    worker = subprocess.Popen(
        [sys.executable, str(script)], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write('{"number": 0}\n')
    worker.stdin.flush()
    assert worker.stdout.readline() == '{"twice": 0}\n'  # and now it is at something that takes for ever
    worker.stdin.close()  # as the death of the parent does
    assert worker.wait(30) == 0
