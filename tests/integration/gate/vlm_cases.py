"""Gate runs of one home with an open engine, for the test files of each engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.settings import Settings
from serving.engines.vlm.vlm_base import VlmBase
from tests.integration.gate.taught_vlm import known, make_settings, question_table, taught_adapter, taught_base, unknown
from tests.support.tiny_vlm import tiny_vlm_adapter
from tests.unit.updater.gate.builders import fresh_suites
from updater.gate.interim_analyses import AnalysisPlan
from updater.gate.run import open_evaluator, run_gate
from updater.gate.suites import Suite, load_suites
from updater.gate.verdict import Verdict
from updater.gate.vlm import VlmEvaluator

TAUGHT = range(160)
SEEN_BY_NOBODY = range(2000, 2120)


@dataclass(frozen=True)
class VlmGate:
    """A home, its open engine, and the folder that adapters are written to."""

    settings: Settings
    base: VlmBase
    evaluator: VlmEvaluator

    @property
    def home(self) -> Path:
        return self.settings.home

    @property
    def suites(self) -> list[Suite]:
        return load_suites(self.settings.gate.suites, self.home, "vlm")

    @property
    def fresh(self) -> list[Suite]:
        """The gain suite: a question that the base was not taught."""
        return fresh_suites(question_table(unknown(SEEN_BY_NOBODY)), family="vlm")

    def gate(self, candidate: str, incumbent: str | None = None, fresh: Sequence[Suite] | None = None) -> Verdict:
        return run_gate(
            evaluator=self.evaluator,
            candidate=candidate,
            incumbent=incumbent,
            suites=self.suites,
            fresh=self.fresh if fresh is None else fresh,
            plan=AnalysisPlan.alone(self.settings.gate.alpha),
            settings=self.settings.gate,
            meta={"rank": 8, "bytes": 50_000},
        )

    def clear(self) -> None:
        """Unload every adapter: an engine has room for only a few."""
        for name in self.evaluator.vlm.engine.resident():
            self.evaluator.vlm.unload(name)
        self.evaluator._directories.clear()

    def noise(self, scale: float) -> str:
        """Load a random adapter; with scale 0 it changes nothing."""
        directory = self.home / f"noise-{scale}"
        name = tiny_vlm_adapter(self.base, directory, seed=3, scale=scale)
        self.evaluator.load(name, directory)
        return name

    def learner(self) -> str:
        return self._taught("learner", [*known(TAUGHT), *unknown(TAUGHT)], steps=120)

    def yes_sayer(self) -> str:
        yes = [replace(one, answer="yes") if one.kind == "presence" else one for one in known(TAUGHT)]
        return self._taught("yes-sayer", yes, steps=80)

    def _taught(self, folder: str, asked: Sequence[Any], steps: int) -> str:
        name = taught_adapter(self.base, self.home / folder, asked, steps)
        self.evaluator.load(name, self.home / folder)
        return name


@contextmanager
def open_vlm_gate(home: Path, engine: str) -> Iterator[VlmGate]:
    settings = make_settings(home, engine)
    base = taught_base(home)
    with open_evaluator(settings, base) as evaluator:
        assert isinstance(evaluator, VlmEvaluator) and evaluator.kind == engine
        yield VlmGate(settings, base, evaluator)
