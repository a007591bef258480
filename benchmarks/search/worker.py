"""One side of the comparison in its own process: commands and answers are lines of JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.line_worker import LineWorker, answer, questions


def call(worker: LineWorker, verb: str, **arguments: Any) -> dict[str, Any]:
    """One command to a side. Raises RatchetError when its process has ended."""
    return worker.ask({"verb": verb, **arguments})


def serve(side: object) -> None:
    for command in questions():
        arguments = {name: value for name, value in command.items() if name != "verb"}
        answer(getattr(side, str(command["verb"]))(**arguments))


def private_gib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return round(int(line.split()[1]) / 2**20, 3)
    return 0.0
