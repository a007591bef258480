"""The upper limit: the served engine in a loop without a server, preceded by the server's decoding.

Run as ``python -m benchmarks.encode.raw SETTINGS``. Reads one JSON object a line, and answers each with one:
``{"describe": true}`` with the precision; ``kind``, ``batch`` and ``seconds`` with ``items`` and
``seconds``.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.encode.payloads import jpegs, text
from benchmarks.line_worker import answer, questions
from core.loading import load_settings
from core.settings import Settings
from core.settings.serving import Serve
from serving.engines.clip import ClipEngine
from serving.engines.processor import usable_cores
from serving.messages import Modality


class RawLoop:
    """Batches through the engine of the settings, on all the threads that the server has for it."""

    def __init__(self, settings: Settings) -> None:
        threads = raw_threads(settings.serve)
        self.engine = ClipEngine.of(settings, threads=threads)
        self._decoding = ThreadPoolExecutor(threads)
        self._jpegs = jpegs()

    def run(self, kind: Modality, batch: int, seconds: float) -> dict[str, float]:
        """Run batches for about this many seconds, after one that is not counted."""
        numbers = count()
        self._encode(kind, batch, numbers)
        began, items = time.perf_counter(), 0
        while time.perf_counter() - began < seconds or not items:
            self._encode(kind, batch, numbers)
            items += batch
        return {"items": items, "seconds": time.perf_counter() - began}

    def _encode(self, kind: Modality, batch: int, numbers: count[int]) -> None:
        if kind == "text":
            self.engine.encode_texts([text(next(numbers)) for _ in range(batch)])
            return
        encoded = [self._jpegs[next(numbers) % len(self._jpegs)] for _ in range(batch)]
        self.engine.encode_images(np.stack(list(self._decoding.map(self.engine.base.preprocess.pixels, encoded))))


def raw_threads(serve: Serve) -> int:
    """Threads of all encoders together; all cores if each may take all."""
    return serve.encoder_replicas * serve.encoder_threads or usable_cores()


def describe(engine: ClipEngine) -> dict[str, Any]:
    return {"precision": engine.precision}


def main(config: Path) -> None:
    raw = RawLoop(load_settings(config, environ={}))
    for question in questions():
        if question.get("describe"):
            answer(describe(raw.engine))
        else:
            answer(raw.run(question["kind"], question["batch"], question["seconds"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
