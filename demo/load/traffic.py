"""HTTP load whose every answer is checked: it must be that of the release it is stamped with.

>>> with Traffic(url, images=images, texts=texts, questions=questions, rate=4.0, settings=settings) as traffic:
...     ...                                  # swap, kill, publish
>>> traffic.report()
Report(requests=812, failed=0, mixed=0, ...)

A child process makes the load. :meth:`Traffic.report` checks it afterwards with :mod:`demo.load.answers`, so checking
does not slow the server during the measurement.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from core.errors import RatchetError
from core.ledger.rows import Family
from core.settings import Settings
from core.waiting import StoodStill, wait_for_progress
from demo.load.answers import AnswerCheck
from demo.load.probes import (
    Question,
    RequestKind,
    batch_probes,
    chat_probes,
    classify_probes,
    embedding_probes,
    interleaved,
    search_probes,
)


@dataclass(frozen=True)
class CheckedSample:
    """A request: due time (seconds since the epoch), duration, and the answering release (0: none)."""

    due: float
    seconds: float
    release: int
    problem: str = ""
    family: Family = "clip"
    kind: RequestKind = "embeddings"
    began: float = 0.0
    """Time at which it was sent; in an open loop a busy machine sends late."""


@dataclass(frozen=True)
class Report:
    """Outcome of a load. ``mixed``: answers that differ from those of the release they are stamped with."""

    requests: int
    failed: int
    mixed: int
    releases: tuple[int, ...]
    samples: tuple[CheckedSample, ...] = field(repr=False, default=())
    problems: tuple[str, ...] = ()


class Traffic:
    """A steady load. CLIP: embeddings of single images, single texts, and pairs; with ``sample_ids`` also
    classification and search. VLM: every third request, if there are questions, is a greedy chat about one image."""

    def __init__(
        self, url: str, *, images: Sequence[bytes], texts: Sequence[str], settings: Settings,
        questions: Sequence[Question] = (), rate: float = 4.0, concurrency: int = 0, sample_ids: Sequence[str] = (),
        batch: int = 0, key: str = "",
    ) -> None:  # fmt: skip
        """``sample_ids``: of the images, if they are the whole catalog; ``batch``: inputs of additional requests."""
        if not images or not texts:
            raise RatchetError("a load needs images and texts.", "Prepare a domain with test items first.")
        self.settings = settings
        self.images = list(images)
        self.texts = list(texts)
        self.questions = list(questions)
        self.sample_ids = list(sample_ids)
        clip = embedding_probes(self.images, self.texts)
        if sample_ids:
            others = classify_probes(self.images, self.texts), search_probes(self.images, self.texts)
            clip = [
                probe for n, embed in enumerate(clip) for probe in (embed, *(each[n % len(each)] for each in others))
            ]
        if batch:
            clip += batch_probes(self.images, self.texts, batch)
        self.probes = interleaved(clip, chat_probes(self.questions))
        requests = [[probe.path, json.dumps(probe.body)] for probe in self.probes]
        self._plan = {"urls": [url], "requests": requests, "rate": rate, "concurrency": concurrency, "key": key}
        self._folder = tempfile.TemporaryDirectory(prefix="ratchet-load-")
        self._results = Path(self._folder.name) / "results.jsonl"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Traffic:
        plan = Path(self._folder.name) / "plan.json"
        plan.write_text(json.dumps(self._plan))
        command = [sys.executable, "-m", "demo.load.generator", str(plan), str(self._results)]
        root = Path(__file__).resolve().parents[2]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=root)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and self._process is not None:
            self._process.kill()  # its answers are not needed any more
        self.stop()

    def stop(self) -> None:
        """Let running requests finish, and end. Calling it again does nothing."""
        if self._process is not None and self._process.stdin is not None and self._process.poll() is None:
            self._process.stdin.close()
            try:
                self._process.wait(90)
            except subprocess.TimeoutExpired:
                self._process.kill()
        if self._process is not None:
            self._process.wait()

    def send_to(self, *urls: str) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(json.dumps(urls).encode() + b"\n")
            self._process.stdin.flush()

    def wait_for(self, requests: int, timeout_seconds: float = 60.0) -> None:
        """Wait until ``requests`` were answered. Raises RatchetError when the load ends or stands still."""

        def answered() -> bool:
            if self._process is not None and self._process.poll() is not None:
                raise RatchetError(f"the load ended with status {self._process.returncode}.", "Its output says why.")
            return len(self._rows()) >= requests

        how_far = lambda: f"{len(self._rows())} of {requests} requests answered"  # noqa: E731
        try:
            wait_for_progress(answered, how_far, still_seconds=timeout_seconds)
        except StoodStill as error:
            raise RatchetError(f"the load stands still: {error}.", "Is the server up?") from None

    def releases(self) -> set[int]:
        return {int(row["r"]) for row in self._rows() if row["c"] == 200}

    def report(self) -> Report:
        """Check every answer so far. Stop first for a final report."""
        rows = self._rows()
        check = AnswerCheck(self.settings, self.probes, self.images, self.texts, self.questions, self.sample_ids, rows)
        samples, problems = [], []
        for row in rows:
            problem = f"{row['c']} {row.get('e', '')}" if row["c"] != 200 else check.difference(row)
            release = row["r"] if row["c"] == 200 else 0
            probe, shown = self.probes[row["p"]], "mixed" if release and problem else problem
            samples.append(CheckedSample(row["t"], row["s"], release, shown, probe.family, probe.kind, row["b"]))
            if problem:
                problems.append(problem)
        failed = sum(sample.release == 0 for sample in samples)
        mixed = sum(sample.problem == "mixed" for sample in samples)
        seen = tuple(sorted({sample.release for sample in samples if sample.release}))
        return Report(len(samples), failed, mixed, seen, tuple(samples), tuple(problems[:20]))

    def _rows(self) -> list[dict[str, Any]]:
        if not self._results.exists():
            return []
        lines = self._results.read_text().split("\n")
        return [json.loads(line) for line in lines[:-1]]  # the text after the last newline is being written


def percentile(seconds: Sequence[float], share: float) -> float:
    """Linearly interpolated; NaN without data."""
    return float(np.percentile(seconds, share * 100)) if seconds else float("nan")
