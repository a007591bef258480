"""A child process that answers lines of JSON with lines of JSON."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.errors import RatchetError

ROOT = Path(__file__).resolve().parents[1]
STOP_SECONDS = 20.0


class LineWorker:
    """``python -m MODULE ARGUMENTS``, or another Python with the path of a script, which idles between questions.

    >>> with LineWorker("benchmarks.encode.generator") as generator:
    ...     generator.ask(asdict(order))
    """

    def __init__(self, module: str, *arguments: str, python: str = sys.executable) -> None:
        self.module = module
        self._process = subprocess.Popen(
            [python, *([module] if module.endswith(".py") else ["-m", module]), *arguments], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Send a line and wait for the answer. Raises RatchetError when the process has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RatchetError(f"{self.module} ended with status {self._process.wait()}.", "See what it printed.")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> LineWorker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def questions() -> Iterator[dict[str, Any]]:
    """In the child: yield the questions. The process ends when standard input does, even during an answer, so that no
    child outlives a killed parent.
    """
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, name="questions", daemon=True).start()
    while True:
        yield json.loads(lines.get())


def answer(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)
