"""HTTP load whose every answer is checked: the vectors must be those of the release that the answer was stamped with.

>>> with Traffic(url, images=images, texts=texts, rate=4.0, settings=settings) as traffic:
...     ...                                  # swap, kill, publish
>>> traffic.report()
Report(requests=812, failed=0, mixed=0, ...)

The load is made by a process of its own. Checking happens in :meth:`Traffic.report`, so it takes nothing from the
server while it is measured: a local engine, which shares nothing with the server but files, encodes the same inputs.
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
import numpy.typing as npt

from ops.artifacts import Artifacts
from ops.errors import RatchetError
from ops.ledger import Ledger
from ops.settings import Settings
from serving.client import data_uri
from serving.deployments.stamps import BASE
from serving.engines.base import load_base
from serving.engines.clip import ClipEngine
from streams.images import decode_image

TOLERANCE = 1e-3
"""Largest difference of a component. Batching changes the sixth digit; adapters differ in the second."""


@dataclass(frozen=True)
class Sample:
    """One request: when it was due (seconds since the epoch), how long it took, which release answered (0: none)."""

    due: float
    seconds: float
    release: int
    problem: str = ""


@dataclass(frozen=True)
class Report:
    """What became of the requests. ``mixed``: answers that are not those of the release they were stamped with."""

    requests: int
    failed: int
    mixed: int
    releases: tuple[int, ...]
    samples: tuple[Sample, ...] = field(repr=False, default=())
    problems: tuple[str, ...] = ()


class Expected:
    """Vectors of the probes under any adapter, computed here."""

    def __init__(self, settings: Settings, images: Sequence[bytes], texts: Sequence[str]) -> None:
        self.artifacts = Artifacts(settings.artifacts)
        self.engine = ClipEngine(load_base(settings.home, settings.base.clip))
        preprocess = self.engine.base.preprocess
        self.pixels = np.stack([preprocess.pixels(decode_image(image)) for image in images])
        self.texts = list(texts)
        self._made: dict[str, npt.NDArray[np.float32]] = {}

    def vectors(self, adapter: str) -> npt.NDArray[np.float32]:
        """All probe items under an adapter: images first, then texts."""
        if adapter not in self._made:
            name = None if adapter == BASE else adapter
            if name is not None:
                self.engine.load(name, self.artifacts.fetch(f"adapters/{name}"))
            self._made[adapter] = np.concatenate(
                [self.engine.encode_images(self.pixels, name), self.engine.encode_texts(self.texts, name)]
            )
            if name is not None:
                self.engine.unload(name)
        return self._made[adapter]


class Traffic:
    """A steady load of embeddings: single images, single texts, and pairs of both (which must be of one release)."""

    def __init__(
        self, url: str, *, images: Sequence[bytes], texts: Sequence[str], settings: Settings, rate: float = 4.0,
        concurrency: int = 0,
    ) -> None:  # fmt: skip
        if not images or not texts:
            raise RatchetError("a load needs images and texts.", "Prepare a domain with test items first.")
        self.settings = settings
        self.images = list(images)
        self.texts = list(texts)
        self.items = _probes(len(images), len(texts))
        everything: list[Any] = [*({"image": data_uri(image)} for image in images), *texts]
        bodies = [
            json.dumps({"input": [everything[i] for i in probe], "encoding_format": "base64"}) for probe in self.items
        ]
        self._plan = {"url": url, "bodies": bodies, "rate": rate, "concurrency": concurrency}
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

    def report(self) -> Report:
        """Check every answer so far. Stop first for a final one."""
        expected = Expected(self.settings, self.images, self.texts)
        adapters = {row.number: row.clip or BASE for row in Ledger.open(self.settings.ledger).releases(100_000)}
        samples, mixed, problems = [], 0, []
        for row in self._rows():
            if row["c"] != 200:
                samples.append(Sample(row["t"], row["s"], 0, f"{row['c']} {row.get('e', '')}"))
                problems.append(samples[-1].problem)
                continue
            got = np.stack([np.frombuffer(base64.b64decode(text), "<f4") for text in row["v"]])
            want = expected.vectors(row["a"])[list(self.items[row["p"]])]
            right = adapters.get(row["r"]) == row["a"] and bool(np.abs(got - want).max() < TOLERANCE)
            if not right:
                mixed += 1
                problems.append(f"release {row['r']} ({row['a']}): differs by {np.abs(got - want).max():.4f}")
            samples.append(Sample(row["t"], row["s"], row["r"], "" if right else "mixed"))
        failed = sum(sample.release == 0 for sample in samples)
        seen = tuple(sorted({sample.release for sample in samples if sample.release}))
        return Report(len(samples), failed, mixed, seen, tuple(samples), tuple(problems[:20]))

    def _rows(self) -> list[dict[str, Any]]:
        if not self._results.exists():
            return []
        lines = self._results.read_text().split("\n")
        return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is being written


def _probes(images: int, texts: int) -> list[tuple[int, ...]]:
    singles: list[tuple[int, ...]] = []
    for index in range(max(images, texts)):
        singles.append((index % images,))
        singles.append((images + index % texts,))
        if index % 4 == 0:
            singles.append((index % images, images + index % texts))
    return singles


def percentile(seconds: Sequence[float], share: float) -> float:
    """Linear between neighbours; not a number when there is nothing."""
    return float(np.percentile(seconds, share * 100)) if seconds else float("nan")
