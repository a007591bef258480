"""HTTP load whose every answer is checked: it must be that of the release which the answer was stamped with.

>>> with Traffic(url, images=images, texts=texts, questions=questions, rate=4.0, settings=settings) as traffic:
...     ...                                  # swap, kill, publish
>>> traffic.report()
Report(requests=812, failed=0, mixed=0, ...)

The load is made by a process of its own. Checking happens in :meth:`Traffic.report`, so it takes nothing from the
server while it is measured: :mod:`benchmarks.expected` answers the same inputs.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from benchmarks.expected import ANSWER_TOKENS, ExpectedAnswers, ExpectedVectors, Question
from ops.errors import RatchetError
from ops.ledger import Ledger
from ops.ledger.rows import Family
from ops.settings import Settings
from serving.client import data_uri
from serving.releases.release_snapshot import BASE

TOLERANCE = 1e-3
"""Largest difference of a component. Batching changes the sixth digit; adapters differ in the second."""


@dataclass(frozen=True)
class Sample:
    """One request: when it was due (seconds since the epoch), how long it took, which release answered (0: none)."""

    due: float
    seconds: float
    release: int
    problem: str = ""
    family: Family = "clip"


@dataclass(frozen=True)
class Report:
    """What became of the requests. ``mixed``: answers that are not those of the release they were stamped with."""

    requests: int
    failed: int
    mixed: int
    releases: tuple[int, ...]
    samples: tuple[Sample, ...] = field(repr=False, default=())
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Probe:
    """One kind of request. ``items``: numbers of images and texts (images first), or the number of one question."""

    family: Family
    items: tuple[int, ...]
    body: dict[str, Any] = field(repr=False)

    @property
    def path(self) -> str:
        """Where it goes."""
        return "/v1/embeddings" if self.family == "clip" else "/v1/chat/completions"


class Traffic:
    """A steady load. CLIP: embeddings of single images, single texts, and pairs of both (which must be of one
    release). VLM: chat about one image, greedy; every third request where there are questions.
    """

    def __init__(
        self, url: str, *, images: Sequence[bytes], texts: Sequence[str], settings: Settings,
        questions: Sequence[Question] = (), rate: float = 4.0, concurrency: int = 0,
    ) -> None:  # fmt: skip
        if not images or not texts:
            raise RatchetError("a load needs images and texts.", "Prepare a domain with test items first.")
        self.settings = settings
        self.images = list(images)
        self.texts = list(texts)
        self.questions = list(questions)
        self.probes = _mixed(_embedding_probes(self.images, self.texts), [_chat(n, q) for n, q in enumerate(questions)])
        requests = [[probe.path, json.dumps(probe.body)] for probe in self.probes]
        self._plan = {"url": url, "requests": requests, "rate": rate, "concurrency": concurrency}
        self._folder = tempfile.TemporaryDirectory(prefix="ratchet-load-")
        self._results = Path(self._folder.name) / "results.jsonl"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Traffic:
        plan = Path(self._folder.name) / "plan.json"
        plan.write_text(json.dumps(self._plan))
        command = [sys.executable, "-m", "benchmarks.generator", str(plan), str(self._results)]
        root = Path(__file__).resolve().parent.parent
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=root)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Let requests under way finish, and end. Twice is once."""
        if self._process is not None and self._process.stdin is not None and self._process.poll() is None:
            self._process.stdin.close()
            try:
                self._process.wait(90)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def wait_for(self, requests: int, timeout_seconds: float = 60.0) -> None:
        """Return when so many requests were answered. Raises RatchetError when they are not in time."""
        end = time.monotonic() + timeout_seconds
        while len(self._rows()) < requests:
            if time.monotonic() > end or (self._process is not None and self._process.poll() is not None):
                raise RatchetError(f"the load has {len(self._rows())} of {requests} answers.", "Is the server up?")
            time.sleep(0.1)

    def releases(self) -> set[int]:
        """Numbers of the releases that answered so far."""
        return {int(row["r"]) for row in self._rows() if row["c"] == 200}

    def report(self) -> Report:
        """Check every answer so far. Stop first for a final one."""
        rows = self._rows()
        check = _Check(self, rows)
        samples, problems = [], []
        for row in rows:
            problem = f"{row['c']} {row.get('e', '')}" if row["c"] != 200 else check.difference(row)
            release = row["r"] if row["c"] == 200 else 0
            family = self.probes[row["p"]].family
            samples.append(Sample(row["t"], row["s"], release, "mixed" if release and problem else problem, family))
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
        return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is being written


class _Check:
    """Compares answers with what they should be. Engines are made when the first answer of a family needs one."""

    def __init__(self, traffic: Traffic, rows: Sequence[dict[str, Any]]) -> None:
        self.probes = traffic.probes
        releases = Ledger.open(traffic.settings.ledger).releases(100_000)
        self.adapters: dict[tuple[Family, int], str] = {}
        for row in releases:
            self.adapters["clip", row.number] = row.clip or BASE
            self.adapters["vlm", row.number] = row.vlm or BASE
        answered = {self.probes[row["p"]].family for row in rows if row["c"] == 200}
        if "clip" in answered:
            self.vectors = ExpectedVectors(traffic.settings, traffic.images, traffic.texts)
        if "vlm" in answered:
            self.answers = ExpectedAnswers(traffic.settings, traffic.questions)
            asked = [row["a"] for row in rows if row["c"] == 200 and self.probes[row["p"]].family == "vlm"]
            self.answers.prepare(asked)

    def difference(self, row: dict[str, Any]) -> str:
        """In what way an answer is not that of its release; empty when it is."""
        probe, stamped = self.probes[row["p"]], f"release {row['r']} ({row['a']})"
        if self.adapters.get((probe.family, row["r"])) != row["a"]:
            return f"{stamped} is stamped with an adapter that it does not have"
        if probe.family == "vlm":
            want = self.answers.of(row["a"])[probe.items[0]]
            return "" if row["y"] == want else f"{stamped}: answers {row['y']!r}, not {want!r}"
        got = np.stack([np.frombuffer(base64.b64decode(text), "<f4") for text in row["v"]])
        apart = float(np.abs(got - self.vectors.of(row["a"])[list(probe.items)]).max())
        return "" if apart < TOLERANCE else f"{stamped}: differs by {apart:.4f}"


def _embedding_probes(images: Sequence[bytes], texts: Sequence[str]) -> list[Probe]:
    everything: list[Any] = [*({"image": data_uri(image)} for image in images), *texts]

    def probe(*items: int) -> Probe:
        return Probe("clip", items, {"input": [everything[item] for item in items], "encoding_format": "base64"})

    probes: list[Probe] = []
    for index in range(max(len(images), len(texts))):
        image, text = index % len(images), len(images) + index % len(texts)
        probes += [probe(image), probe(text)]
        if index % 4 == 0:
            probes.append(probe(image, text))
    return probes


def _chat(number: int, asked: Question) -> Probe:
    image, text = asked
    content = [{"type": "image_url", "image_url": {"url": data_uri(image)}}, {"type": "text", "text": text}]
    body = {"model": "vlm", "messages": [{"role": "user", "content": content}], "temperature": 0,
            "max_tokens": ANSWER_TOKENS}  # fmt: skip
    return Probe("vlm", (number,), body)


def _mixed(clip: list[Probe], vlm: list[Probe]) -> list[Probe]:
    """Two of CLIP, one of the VLM, until each was asked at least once."""
    if not vlm:
        return clip
    rounds = max((len(clip) + 1) // 2, len(vlm))
    return [
        probe
        for n in range(rounds)
        for probe in (clip[2 * n % len(clip)], clip[(2 * n + 1) % len(clip)], vlm[n % len(vlm)])
    ]


def percentile(seconds: Sequence[float], share: float) -> float:
    """Linear between neighbours; not a number when there is nothing."""
    return float(np.percentile(seconds, share * 100)) if seconds else float("nan")
