"""Systems that are measured in turns: servers over HTTP, and the model alone."""

from __future__ import annotations

import base64
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import numpy as np

from benchmarks.encode.generator import LoadResult, Order
from benchmarks.encode.grid import Cell
from benchmarks.encode.payloads import BodyTemplate, JpegInput, jpegs, text
from benchmarks.line_worker import LineWorker
from benchmarks.serving.session_processes import session_pids
from core.errors import RatchetError
from core.settings import Settings
from demo.load.traffic import percentile
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from serving.messages import Modality

CHECKED = 4
"""Inputs of each kind whose vectors are compared before anything is measured."""
LEAST_COSINE = 0.99
TELLING_COSINE = 0.999
ENCODER = "ServeReplica:ratchet:Encoder"


@dataclass(frozen=True)
class Turn:
    """One side in one cell, once."""

    requests: int
    failed: int
    seconds: float
    p50: float
    """Seconds, of answered requests; NaN for the model alone."""
    p99: float
    problems: tuple[str, ...] = ()
    outside_ms: float | None = None
    """CPU milliseconds of the server's processes without its encoders, for each request; None if not measured."""
    generator_ms: float = field(default=0.0)
    """CPU milliseconds of the load's own process for each request."""

    @property
    def rate(self) -> float:
        return self.requests / self.seconds if self.seconds else 0.0


class Side(ABC):
    """A system that embeds."""

    def __init__(self, name: str, kinds: Sequence[Modality] = ("image", "text")) -> None:
        """``kinds``: of input that it supports."""
        self.name = name
        self.kinds = list(kinds)

    @abstractmethod
    def measure(self, cell: Cell, seconds: float) -> Turn:
        """Run one turn of about this many seconds."""

    @abstractmethod
    def vectors(self, kind: Modality) -> np.ndarray:
        """Vectors of the inputs of :func:`check`, float32 [n, dim]. Raises RatchetError."""


class HttpSide(Side):
    def __init__(
        self, name: str, url: Callable[[Modality], str], template: Callable[[Modality], BodyTemplate],
        generator: LineWorker,
        kinds: Sequence[Modality] = ("image", "text"), pause: Callable[[], None] = lambda: None,
        resume: Callable[[], None] = lambda: None, outside: Callable[[], list[int]] = list,
    ) -> None:  # fmt: skip
        """``pause`` and ``resume``: after and before each turn. ``outside``: the processes whose CPU time counts."""
        super().__init__(name, kinds)
        self.url = url
        self.template = template
        self._generator = generator
        self._pause = pause
        self._resume = resume
        self.outside = outside

    def measure(self, cell: Cell, seconds: float) -> Turn:
        order = Order(self.url(cell.kind), self.template(cell.kind), cell.kind, cell.items, cell.concurrency, seconds)
        self._resume()
        outside = self.outside()
        before = cpu_seconds(outside)
        try:
            result = LoadResult(**self._generator.ask(asdict(order)))
        finally:
            self._pause()
        requests = len(result.latencies)
        spent = cpu_seconds(outside) - before
        return Turn(
            requests, result.failed, result.seconds, percentile(result.latencies, 0.5),
            percentile(result.latencies, 0.99), tuple(result.problems),
            1000 * spent / requests if outside and requests else None,
            1000 * result.cpu_seconds / max(1, requests + result.failed),
        )  # fmt: skip

    def vectors(self, kind: Modality) -> np.ndarray:
        inputs: list[tuple[bytes, ...]] = (
            [(text(number).encode(),) for number in range(CHECKED)]
            if kind == "text"
            else [JpegInput(each).numbered(0) for each in jpegs(CHECKED)]
        )
        self._resume()
        try:
            answer = httpx.post(
                self.url(kind), content=b"".join(self.template(kind).parts(inputs)), timeout=120.0, trust_env=False,
                headers={"content-type": "application/json"},
            )  # fmt: skip
            rows = answer.json()["data"]
            return np.stack([np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in rows])
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise RatchetError(f"{self.name} does not embed a {kind}: {error!r}", "See its log.") from error
        finally:
            self._pause()


class RawSide(Side):
    """An engine without a server (:mod:`benchmarks.encode.raw`). A request is a batch; latency is meaningless here."""

    def __init__(self, worker: LineWorker, max_batch: int, name: str = "raw") -> None:
        """``max_batch``: images of the largest batch that the server makes."""
        self.about = worker.ask({"describe": True})
        super().__init__(name, self.about.get("kinds", ("image", "text")))
        self._worker = worker
        self._max_batch = max_batch

    def measure(self, cell: Cell, seconds: float) -> Turn:
        batch = cell.batch(self._max_batch)
        answer = self._worker.ask({"kind": cell.kind, "batch": batch, "seconds": seconds})
        return Turn(answer["items"] // cell.items, 0, answer["seconds"], float("nan"), float("nan"))

    def vectors(self, kind: Modality) -> np.ndarray:
        return np.array(self._worker.ask({"kind": kind, "vectors": CHECKED})["vectors"], np.float32)


def ratchet_template(kind: Modality) -> BodyTemplate:
    item = ('{"image":"data:image/jpeg;base64,', '"}') if kind == "image" else ('"', '"')
    return BodyTemplate('{"model":"clip","encoding_format":"base64","input":[', item, "]}")


def ratchet_side(settings: Settings, generator: LineWorker) -> HttpSide:
    """The running server of ``settings``."""

    def outside() -> list[int]:
        encoders = set(session_pids(settings, ENCODER))
        return [pid for pid in session_pids(settings) if pid not in encoders]

    url = f"{settings.serve.url}/v1/embeddings"
    return HttpSide("ratchet", lambda _: url, ratchet_template, generator, outside=outside)


def check(ours: Side, peers: Iterable[Side], base: ClipBase, unable: dict[str, str]) -> dict[str, float]:
    """Each server's least cosine to the base's own vectors. ``unable``: gets the reason of each peer that does not
    embed a kind of input; it is not asked for that any more. Raises RatchetError if Ratchet does not answer; or a
    server does not have this model: a vector is below :data:`LEAST_COSINE`, or nearer to another input's,
    unless the base itself, with random weights, cannot tell the inputs apart.
    """
    engine = ClipEngine(base)
    pixels = np.stack([base.preprocess.pixels(each) for each in jpegs(CHECKED)])
    expected = {"image": engine.encode_images(pixels), "text": engine.encode_texts([text(n) for n in range(CHECKED)])}
    least: dict[str, float] = {}
    for side in (ours, *peers):
        for kind in tuple(side.kinds):
            try:
                vectors = side.vectors(kind)
            except RatchetError as error:
                if side is ours:
                    raise
                unable[f"{side.name}, {kind}"] = error.message
                side.kinds.remove(kind)
                continue
            cosines = vectors @ expected[kind].T
            own = cosines.diagonal()
            tells_apart = (expected[kind] @ expected[kind].T - np.eye(CHECKED)).max() < TELLING_COSINE
            if own.min() < LEAST_COSINE or (tells_apart and (cosines.argmax(axis=1) != np.arange(CHECKED)).any()):
                raise RatchetError(
                    f"{side.name} answers other {kind} vectors than the base: cosines {np.round(cosines, 4).tolist()}.",
                    "It does not have the same weights, or prepares its inputs in another way.",
                )
            least[f"{side.name}_{kind}"] = round(float(own.min()), 5)
    return least


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of all threads of these processes so far; ended processes do not count."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")
