"""One method along one order with one seed: train, serve, ask; then the next update.

After each update one JSON file is written; what a killed run has not written is done again, and training goes on from
its own checkpoint. Only the adapter, the memory and the vectors of the last update are kept.
"""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.continual.cross_version import cross_version_recall
from benchmarks.continual.evaluation import Bools, Encoded, Evaluator, images_of
from benchmarks.continual.nearest import NAME as NEAREST
from benchmarks.continual.nearest import nearest_means
from benchmarks.continual.orders import order_of
from benchmarks.continual.plan import Plan, draw, plan
from benchmarks.continual.protocol import Protocol
from benchmarks.continual.provenance import provenance
from benchmarks.continual.stream import Stream
from benchmarks.continual.tuning import recipe_of
from ops.digests import digest_json
from ops.progress import say
from serving.engines.clip_base import ClipBase
from updater.data.pools import mixed_seed
from updater.recipes import Recipe
from updater.training.checkpoint import read_json, write_json
from updater.training.result import Limits, cost_of
from updater.training.train import train

ZERO_SHOT = "zero-shot.json"
BASE_VECTORS = "base-vectors.npz"
CACHE = "cache"
"""Folder of pixels and boundaries: what is there of them need not be computed again."""
SECONDS = 3600.0
"""Wall-clock bound of an update; none comes near it unless the machine stands still."""


@dataclass(frozen=True)
class Unit:
    """A chain of updates."""

    method: str
    order: int = 0
    seed: int = 0
    trial: int | None = None
    """Of :mod:`benchmarks.continual.tuning`; None: with what was chosen."""

    @property
    def recipe(self) -> Recipe:
        """The recipe that it runs, with the rates and weights of its trial, or those that were chosen."""
        return recipe_of(self.method, self.trial)

    def folder(self, results: Path) -> Path:
        """Where its files are."""
        trial = "" if self.trial is None else f"-trial{self.trial}"
        return results / "units" / self.method / f"order{self.order}-seed{self.seed}{trial}"

    def __str__(self) -> str:
        trial = "" if self.trial is None else f", trial {self.trial}"
        return f"{self.method} (order {self.order}, seed {self.seed}{trial})"


def update_path(folder: Path, number: int) -> Path:
    """The file of an update, counted from 1."""
    return folder / f"update-{number:02d}.json"


def chain_name(recipe: Recipe, unit: Unit) -> str:
    """Stands in the file of each update: those of another recipe under the same name do not count."""
    return digest_json([recipe.digest, unit.order, unit.seed])


def updates_done(results: Path, recipe: Recipe, unit: Unit) -> list[dict[str, Any]]:
    """What is there of a unit: the files of its updates, up to the first that is missing."""
    updates: list[dict[str, Any]] = []
    while True:
        row = read_json(update_path(unit.folder(results), len(updates) + 1))
        if not isinstance(row, dict) or row.get("chain") != chain_name(recipe, unit):
            return updates
        updates.append(row)


class Chain:
    """Runs a unit in this process."""

    def __init__(
        self, base: ClipBase, stream: Stream, protocol: Protocol, recipe: Recipe, unit: Unit, results: Path,
        evaluator: Evaluator | None = None,
    ) -> None:  # fmt: skip
        """``evaluator``: of this base, to save making one. Raises BudgetError."""
        self.base, self.stream, self.protocol, self.unit, self.results = base, stream, protocol, unit, results
        self.recipe = recipe
        self.folder = unit.folder(results)
        self.evaluator = evaluator or Evaluator(base, stream.suites, results / CACHE)
        self.base_vectors = self._zero_shot()
        self.order = order_of(stream, unit.order, self._means)
        self.plan: Plan = plan(base, recipe, stream, protocol, results / "plans")

    def _zero_shot(self) -> Encoded:
        """The base's answers, written once for all chains, and its vectors."""
        path, answers = self.results / BASE_VECTORS, self.results / ZERO_SHOT
        if not path.is_file() or not answers.is_file():
            vectors = self.evaluator.encode(None)
            self.results.mkdir(parents=True, exist_ok=True)
            vectors.write(path)
            roles = {suite.name: suite.role for suite in self.stream.suites}
            known = {
                "roles": roles,
                "tasks": {suite.name: suite.task for suite in self.stream.suites},
                "outside": [suite.name for suite in self.stream.suites if suite.outside],
                "alike": self.stream.alike,
                "hits": packed(self.evaluator.outcomes(vectors)),
                "named": packed(self.evaluator.named(vectors)),
                NEAREST: packed(nearest_means(self.evaluator, self.stream, vectors)),
            }
            write_json(answers, known)
        return self.evaluator.read(path)

    def run(self, updates: int, stop: Callable[[], bool] = lambda: False) -> None:
        """Go on until ``updates`` are done. Raises Stopped, and what :func:`updater.training.train.train` raises."""
        rows = updates_done(self.results, self.recipe, self.unit)
        for number in range(len(rows), min(updates, len(self.order))):
            say(f"{self.unit}: update {number + 1} of {updates}, {self.order[number]}")
            rows.append(self._update(number, rows[-1] if rows else {}, stop))

    def _vectors_path(self, number: int) -> Path:
        return self.folder / f"vectors-{number:02d}.npz" if number else self.results / BASE_VECTORS

    def _update(self, number: int, last: dict[str, Any], stop: Callable[[], bool]) -> dict[str, Any]:
        adapters, work = self.folder / "adapters", self.folder / "work" / str(number + 1)
        began = time.process_time()
        result = train(
            self.base,
            self.plan.recipe,
            draw(self.stream, self.order, number, self.plan.recipe, self.protocol, self.unit.seed),
            adapters / last["adapter"] if last else None,
            seed=mixed_seed(self.unit.seed, number),
            limits=Limits(self.protocol.gflops, SECONDS, threads=1, checkpoint_steps=20),
            out_dir=adapters,
            work_dir=work,
            carry_over=adapters / last["memory"] if last.get("memory") else None,
            stop=stop,
            device="cpu",
        )
        trained = time.process_time()
        vectors = self.evaluator.encode(result.directory)
        row = {
            "chain": chain_name(self.recipe, self.unit),
            "update": self.order[number],
            "adapter": result.adapter,
            "memory": result.carry_over.name if result.carry_over else None,
            "hits": packed(self.evaluator.outcomes(vectors)),
            "named": packed(self.evaluator.named(vectors)),
            "cross": cross_version_recall(
                self.stream.suites, self.evaluator.read(self._vectors_path(number)), vectors, self.base_vectors
            ),
            "cost": cost_of(result),
            "cpu_seconds": {"training": trained - began, "asking": time.process_time() - trained},
            "origin": provenance(),
            "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        vectors.write(self._vectors_path(number + 1))
        write_json(update_path(self.folder, number + 1), row)
        shutil.rmtree(work, ignore_errors=True)
        for path in adapters.iterdir():
            if path.name not in (row["adapter"], row["memory"]):
                shutil.rmtree(path, ignore_errors=True)
        if number:
            self._vectors_path(number).unlink(missing_ok=True)
        return row

    def _means(self) -> dict[str, NDArray[np.float32]]:
        """By update, the mean of the base's vectors of its suite's pictures."""
        suites = {suite.name: suite for suite in self.stream.suites}
        return {name: images_of(suites[name], self.base_vectors).mean(axis=0) for name in self.stream.updates}


def packed(outcomes: dict[str, Bools]) -> dict[str, list[str]]:
    """One string of 0 and 1 for each view of a suite, so that intervals can be computed later."""
    return {name: ["".join("01"[int(hit)] for hit in view) for view in hits.T] for name, hits in outcomes.items()}
