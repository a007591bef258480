"""One method along one order with one seed: train, serve and evaluate, update by update.

Each update writes one JSON file; a killed run repeats what has no file, and training resumes from its own checkpoint.
Only the adapter, the memory and the vectors of the last update are kept.
"""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.continual.exam import Exam
from benchmarks.continual.plan import ExperimentPlan, Lessons, draw, plan
from benchmarks.continual.protocol import Protocol
from benchmarks.continual.provenance import provenance
from benchmarks.continual.tuning import Place, recipe_of
from core.digests import digest_json
from core.progress import progress_log
from updater.data.pools import mixed_seed
from updater.recipes import Recipe
from updater.step.learner import Base
from updater.training.checkpoint import read_json, write_json
from updater.training.result import Limits, cost_of
from updater.training.train import train

SECONDS = 3600.0
"""Wall-clock limit of an update; only a stalled machine comes near it."""


@dataclass(frozen=True)
class Unit:
    """A chain of updates of a recipe or a variant (:mod:`benchmarks.continual.variants`)."""

    method: str
    order: int = 0
    seed: int = 0
    trial: Place | None = None
    """Of :mod:`benchmarks.continual.tuning`; None: the chosen trial."""

    @property
    def recipe(self) -> Recipe:
        return recipe_of(self.method, self.trial)

    def folder(self, results: Path) -> Path:
        trial = "" if self.trial is None else "-trial{}.{}".format(*self.trial)
        return results / "units" / self.method / f"order{self.order}-seed{self.seed}{trial}"

    def __str__(self) -> str:
        trial = "" if self.trial is None else f", trial {self.trial}"
        return f"{self.method} (order {self.order}, seed {self.seed}{trial})"


def update_path(folder: Path, number: int) -> Path:
    """The file of an update, counted from 1."""
    return folder / f"update-{number:02d}.json"


def chain_name(recipe: Recipe, unit: Unit) -> str:
    """Written into the file of each update: files of another recipe under the same name do not count."""
    return digest_json([recipe.digest, unit.order, unit.seed])


def updates_done(results: Path, recipe: Recipe, unit: Unit) -> list[dict[str, Any]]:
    """The files of a unit's updates, up to the first that is missing."""
    updates: list[dict[str, Any]] = []
    while True:
        row = read_json(update_path(unit.folder(results), len(updates) + 1))
        if not isinstance(row, dict) or row.get("chain") != chain_name(recipe, unit):
            return updates
        updates.append(row)


class Chain:
    def __init__(
        self, base: Base, lessons: Lessons, protocol: Protocol, recipe: Recipe, unit: Unit, results: Path, exam: Exam,
    ) -> None:  # fmt: skip
        self.base, self.lessons, self.protocol, self.unit, self.results = base, lessons, protocol, unit, results
        self.recipe, self.exam = recipe, exam
        self.folder = unit.folder(results)
        self.order = exam.order(unit.order)
        self.plan: ExperimentPlan = plan(base, recipe, lessons, protocol, results / "plans")

    def run(self, updates: int, stop: Callable[[], bool] = lambda: False) -> None:
        """Continue until ``updates`` are done. Raises Stopped, and what :func:`updater.training.train.train` raises."""
        rows = updates_done(self.results, self.recipe, self.unit)
        for number in range(len(rows), min(updates, len(self.order))):
            progress_log.info(f"{self.unit}: update {number + 1} of {updates}, {self.order[number]}")
            rows.append(self._update(number, rows[-1] if rows else {}, stop))

    def _update(self, number: int, last: dict[str, Any], stop: Callable[[], bool]) -> dict[str, Any]:
        adapters, work = self.folder / "adapters", self.folder / "work" / str(number + 1)
        began = time.process_time()
        result = train(
            self.base,
            self.plan.recipe,
            draw(self.lessons, self.order, number, self.plan.recipe, self.protocol, self.unit.seed),
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
        answers = self.exam.after(number, result.directory)
        row = {
            "chain": chain_name(self.recipe, self.unit),
            "update": self.order[number],
            "adapter": result.adapter,
            "memory": result.carry_over.name if result.carry_over else None,
            **answers,
            "cost": cost_of(result),
            "cpu_seconds": {"training": trained - began, "asking": time.process_time() - trained},
            "origin": provenance(),
            "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        write_json(update_path(self.folder, number + 1), row)
        shutil.rmtree(work, ignore_errors=True)
        for path in adapters.iterdir():
            if path.name not in (row["adapter"], row["memory"]):
                shutil.rmtree(path, ignore_errors=True)
        self.exam.kept(number)
        return row
