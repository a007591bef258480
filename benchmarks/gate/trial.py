"""Train one candidate, evaluate it on everything, and keep its outcomes in one file."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gate.cases import Answers
from benchmarks.gate.engine import LateEngine
from benchmarks.gate.plans import GALLERY, KNOWN, NEW, GatePlan
from benchmarks.gate.population import Population
from benchmarks.gate.scaling import write_scaled
from benchmarks.gate.training_data import exchanged, pools
from core.digests import digest_json
from core.errors import RatchetError, TrainingError
from core.progress import step
from core.settings import Settings
from demo.data import DOMAINS, prepare_domain
from serving.engines.clip_base import ClipBase, load_base
from updater.gate.score import Scorer, load_arrays, store_arrays
from updater.gate.suites import Suite, load_suites
from updater.training.result import Limits
from updater.training.train import train

LIMITS = Limits(gflops=1e9, seconds=3600.0, threads=1, checkpoint_steps=1000)
"""Steps are limited by the recipes, not by the budget."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One model and its answers. ``answers`` is empty if training itself refused the candidate."""

    name: str
    adapter: str
    answers: dict[str, Answers]
    """By suite name, of every item: [n, views]."""
    seconds: float
    error: str = ""


class Workshop:
    """The base, its serving engine, the suites with all their items, and a folder of results."""

    def __init__(self, home: Path, base: ClipBase, populations: Sequence[Population], out: Path) -> None:
        self.home, self.base, self.out = home, base, out
        self.populations = {population.suite.name: population for population in populations}
        self.engine = LateEngine(base)
        self.scorer = Scorer(self.engine)
        self._populations_digest = digest_json([population.digest for population in self.populations.values()])

    @classmethod
    def open(cls, settings: Settings, out: Path, mislabelled: bool = False) -> Workshop:
        """With the settings' base, and data that are prepared if missing. ``mislabelled``: the new domains' captions
        are exchanged. Raises RatchetError."""
        shipped = [suite for suite in load_suites([], settings.home, "clip") if suite.role == "retention"]
        retention = [s.model_copy(update={"limit": GALLERY.get(s.name, s.limit)}) for s in shipped]
        for domain in sorted({*NEW, *KNOWN, *(suite.folder.name for suite in retention)} & DOMAINS.keys()):
            prepare_domain(domain, settings.home)
        gains = [
            Population.of(suite, exchanged(suite.folder) if mislabelled else None)
            for suite in (fresh(settings.home, domain) for domain in NEW)
        ]
        populations = [*(Population.of(suite) for suite in retention), *gains]
        return cls(settings.home, load_base(settings.home, settings.base.clip), populations, out)

    def suites(self, domain: str) -> tuple[Suite, ...]:
        wanted = fresh_name(domain)
        suites = [population.suite for population in self.populations.values()]
        return tuple(suite for suite in suites if suite.role == "retention" or suite.name == wanted)

    def of_base(self) -> Trial:
        key = digest_json([self.base.digest, self._populations_digest])
        return self._cached("base", key) or self._cache(Trial("base", "", self._ranks(None), 0.0), key)

    def of(self, plan: GatePlan, incumbent: Trial | None) -> Trial:
        """A candidate's answers; it is trained unless its file exists. ``incumbent``: the trial that it continues."""
        given = {**asdict(plan), "recipe": plan.recipe.digest}
        key = digest_json([given, incumbent.adapter if incumbent else "", self.base.digest, self._populations_digest])
        return self._cached(plan.name, key) or self._cache(self._trained(plan, incumbent), key)

    def of_scaled(self, plan: GatePlan, parent: GatePlan) -> Trial:
        """Answers of ``parent``'s candidate with ``plan.scale`` times its change of the base's weights. The parent
        starts from the base; it is trained again if its adapter is not in the folder.
        """
        trained = self.of(parent, None)
        key = digest_json([plan.name, plan.scale, trained.adapter, self.base.digest, self._populations_digest])
        cached = self._cached(plan.name, key)
        if cached is not None:
            return cached
        directory = self.out / "adapters" / trained.adapter
        if not directory.is_dir():
            self._trained(parent, None)
        started, work = time.monotonic(), self.out / "work" / plan.name
        shutil.rmtree(work, ignore_errors=True)
        try:
            adapter = write_scaled(directory, self.base, plan.scale, work / "adapter")
            ranks = self._answers(adapter, work / "adapter")
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return self._cache(Trial(plan.name, adapter, ranks, time.monotonic() - started), key)

    def _answers(self, adapter: str, directory: Path) -> dict[str, Answers]:
        self.engine.load(adapter, directory)
        ranks = self._ranks(adapter)
        own, base = self.engine.spaces(adapter), self.engine.spaces(None)
        for known, space, shared in (
            (self.scorer._images, own.image, base.image),
            (self.scorer._texts, own.text, base.text),
        ):
            if space != shared:
                known.pop(space, None)
        self.engine.unload(adapter)
        return ranks

    def _trained(self, plan: GatePlan, incumbent: Trial | None) -> Trial:
        started = time.monotonic()
        adapters, work = self.out / "adapters", self.out / "work" / plan.name
        before = adapters / incumbent.adapter if incumbent else None
        with step(f"candidate {plan.name}"):
            training_pools = pools(plan, self.home)
            try:
                result = train(
                    self.base, plan.recipe, training_pools, before, seed=plan.seed, limits=LIMITS, out_dir=adapters,
                    work_dir=work, device="cpu",
                )  # fmt: skip
            except TrainingError as error:
                return Trial(plan.name, "", {}, time.monotonic() - started, error.message)
            finally:
                shutil.rmtree(work, ignore_errors=True)
            ranks = self._answers(result.adapter, result.directory)
        return Trial(plan.name, result.adapter, ranks, time.monotonic() - started)

    def _ranks(self, adapter: str | None) -> dict[str, Answers]:
        return {name: population.ranks(self.scorer, adapter) for name, population in self.populations.items()}

    def _path(self, name: str) -> Path:
        return self.out / "outcomes" / f"{name}.npz"

    def _cache(self, trial: Trial, key: str) -> Trial:
        about = {"key": key, "adapter": trial.adapter, "seconds": trial.seconds, "trouble": trial.error}
        store_arrays(self._path(trial.name), about=np.array(json.dumps(about)), **trial.answers)
        return trial

    def _cached(self, name: str, key: str) -> Trial | None:
        record = load_arrays(self._path(name), ("about",))
        about: dict[str, Any] = json.loads(str(record[0])) if record else {}
        if about.get("key") != key:
            return None
        names = [] if about["trouble"] else list(self.populations)
        arrays = load_arrays(self._path(name), names)
        if arrays is None:
            return None
        # earlier runs kept hits alone, in bytes
        answers = {
            suite: array.astype(np.float64) if array.dtype == np.uint8 else array
            for suite, array in zip(names, arrays, strict=True)
        }
        return Trial(name, about["adapter"], answers, about["seconds"], about["trouble"])


def fresh_name(domain: str) -> str:
    return f"fresh.{domain}"


def fresh(home: Path, domain: str) -> Suite:
    """A domain's held-out items as the gain suite that its `fresh_eval` samples would be."""
    data = str(home / "data" / domain)
    return Suite(name=fresh_name(domain), role="gain", task="retrieval", data=data, split="test", limit=400)


def run_all(workshop: Workshop, wanted: Sequence[GatePlan]) -> Mapping[str, Trial]:
    """Every plan's trial by name. Raises RatchetError when a plan's incumbent could not be trained."""
    trials: dict[str, Trial] = {"base": workshop.of_base()}
    for plan in wanted:
        incumbent = trials[plan.incumbent] if plan.incumbent else None
        if incumbent is not None and incumbent.error:
            raise RatchetError(f"{plan.name} goes on from {plan.incumbent}: {incumbent.error}", "Lower its rate.")
        trials[plan.name] = workshop.of(plan, incumbent)
    return trials
