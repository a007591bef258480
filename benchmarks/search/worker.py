"""One side of the comparison in a process of its own: commands and answers are lines of JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from ops.errors import RatchetError


class Side(Protocol):
    """What a worker process holds."""

    def grow(self, rows: int) -> dict[str, Any]:
        """Hold the first ``rows`` vectors; returns what it cost."""

    def measure(self, callers: int, seconds: float, filtered: bool) -> dict[str, Any]:
        """Search in a closed loop; returns requests a second, latencies and recall@10."""


class Worker:
    """Starts ``python -m MODULE FOLDER`` and talks with it."""

    def __init__(self, module: str, folder: Path, *arguments: str) -> None:
        self.module = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(folder), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def call(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """One command. Raises RatchetError when the process has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"verb": verb, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise RatchetError(f"{self.module} has ended: {self._process.wait()}.", "See what it wrote above.")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._process:
            self._process.kill()


def serve(side: Side) -> None:
    """In the worker's process: answer commands until there are no more."""
    for line in sys.stdin:
        command: Mapping[str, Any] = json.loads(line)
        arguments = {name: value for name, value in command.items() if name != "verb"}
        print(json.dumps(getattr(side, str(command["verb"]))(**arguments)), flush=True)


def private_gib() -> float:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return round(int(line.split()[1]) / 2**20, 3)
    return 0.0
