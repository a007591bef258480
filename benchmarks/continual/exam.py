"""Questions to a chain before its first update and after each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.continual.cross_version import cross_version_recall
from benchmarks.continual.evaluation import Bools, Encoded, Evaluator, images_of
from benchmarks.continual.nearest import NAME as NEAREST
from benchmarks.continual.nearest import nearest_means
from benchmarks.continual.orders import order_of
from benchmarks.continual.stream import Stream
from updater.training.checkpoint import write_json

ZERO_SHOT = "zero-shot.json"
"""The base's answers, in the results' folder: written once for all chains."""
BASE_VECTORS = "base-vectors.npz"
CACHE = "cache"
"""Folder of pixels and boundaries, which are reused."""


class Exam(Protocol):
    """Of one chain. Its first use asks the base, unless another chain has."""

    def order(self, number: int) -> list[str]:
        """Names of the updates in an order."""

    def after(self, number: int, adapter: Path) -> dict[str, Any]:
        """Answers after update ``number``, counted from 0, for its file: at least ``hits`` by suite."""

    def kept(self, number: int) -> None:
        """Called when the update's file is written."""


class ClipExam:
    """Searches, classes, and searches across versions of a CLIP. Vectors of the last update are kept in files."""

    def __init__(self, evaluator: Evaluator, stream: Stream, results: Path, folder: Path) -> None:
        """``results``: of all chains of a base; ``folder``: of this one."""
        self.evaluator, self.stream, self.results, self.folder = evaluator, stream, results, folder
        self.base_vectors = self._zero_shot()

    def _zero_shot(self) -> Encoded:
        path, answers = self.results / BASE_VECTORS, self.results / ZERO_SHOT
        if not path.is_file() or not answers.is_file():
            vectors = self.evaluator.encode(None)
            self.results.mkdir(parents=True, exist_ok=True)
            vectors.write(path)
            known = {
                "roles": {suite.name: suite.role for suite in self.stream.suites},
                "tasks": {suite.name: suite.task for suite in self.stream.suites},
                "outside": [suite.name for suite in self.stream.suites if suite.outside],
                "alike": self.stream.alike,
                "hits": packed(self.evaluator.outcomes(vectors)),
                "named": packed(self.evaluator.named(vectors)),
                NEAREST: packed(nearest_means(self.evaluator, self.stream, vectors)),
            }
            write_json(answers, known)
        return self.evaluator.read(path)

    def order(self, number: int) -> list[str]:
        return order_of(self.stream, number, self._means)

    def after(self, number: int, adapter: Path) -> dict[str, Any]:
        vectors = self.evaluator.encode(adapter)
        before = self.evaluator.read(self._path(number))
        vectors.write(self._path(number + 1))
        return {
            "hits": packed(self.evaluator.outcomes(vectors)),
            "named": packed(self.evaluator.named(vectors)),
            "cross": cross_version_recall(self.stream.suites, before, vectors, self.base_vectors),
        }

    def kept(self, number: int) -> None:
        if number:
            self._path(number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"vectors-{number:02d}.npz" if number else self.results / BASE_VECTORS

    def _means(self) -> dict[str, NDArray[np.float32]]:
        suites = {suite.name: suite for suite in self.stream.suites}
        return {name: images_of(suites[name], self.base_vectors).mean(axis=0) for name in self.stream.updates}


class TrialExam(ClipExam):
    """Only the suites' answers after the last update, by which a trial is judged."""

    def __init__(self, evaluator: Evaluator, stream: Stream, results: Path, folder: Path, updates: int) -> None:
        super().__init__(evaluator, stream, results, folder)
        self.updates = updates

    def after(self, number: int, adapter: Path) -> dict[str, Any]:
        if number + 1 < self.updates:
            return {"hits": {}}
        return {"hits": packed(self.evaluator.outcomes(self.evaluator.encode(adapter)))}


def packed(outcomes: Mapping[str, Bools]) -> dict[str, list[str]]:
    """One string of 0 and 1 for each view of a suite, so that intervals can be computed later."""
    return {name: ["".join("01"[int(hit)] for hit in view) for view in hits.T] for name, hits in outcomes.items()}
