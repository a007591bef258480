"""A simulated model whose answers to re-used items move from update to update as those of real updates do.

An item is answered right if its ease, the suite's level and the item's noise add up to more than 0. Ease is standard
normal, so half of all answers are right under the base; the level gives a suite its true share of right answers, and
noise moves single answers without moving that share. Noise follows an AR(1) around the base (answers *return* to what
they were), or a random walk. Step and coefficient are solved from how far items had moved in the chains of `ratchet
bench continual`: two answers of jointly normal scores with correlation r differ with probability arccos(r) / pi.
"""

from __future__ import annotations

import json
import math
import tarfile
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize
from scipy.special import ndtri

from benchmarks.gate.cases import ItemMarks
from updater.gate.suite_items import SEALED
from updater.gate.suites import Suite

ARCHIVE = Path(__file__).parents[2] / "docs" / "benchmarks" / "continual" / "outcomes.tar.xz"
SUITES = 7
SMALL, SMALL_MARGIN = 400, 0.07
"""Suites with fewer items have a wider margin, as shipped ones of 240 to 300 items have."""
LAST = 8
"""Updates of a chain of `ratchet bench continual`."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Churn:
    """Standard deviation of one item's difference (mean over its views), by what it is a difference from."""

    first: float
    """The base, after one update."""
    last: float
    """The base, after LAST updates."""
    previous: float
    """The predecessor, in the update LAST."""


def read_churn(archive: Path = ARCHIVE) -> Churn:
    """As measured on the held-out domains of the default recipe's chains."""
    chains: dict[str, dict[int, Any]] = defaultdict(dict)
    base: Any = None
    with tarfile.open(archive) as files:
        for member in files:
            path, file = Path(member.name), files.extractfile(member)
            if file is None:
                continue
            if path.name == "zero-shot.json":
                base = json.load(file)
            elif "default" in path.parts and path.stem.startswith("update-"):
                chains[path.parent.name][int(path.stem.removeprefix("update-"))] = json.load(file)["hits"]

    def spread(number: int, before: int) -> float:
        differences = [
            _hits(hits[number][name]) - _hits((hits[before] if before else base["hits"])[name])
            for hits in chains.values()
            for name in hits[number]
            if base["roles"].get(name) == "held-out"
        ]
        sizes = [len(found) for found in differences]
        return math.sqrt(np.average([found.var() for found in differences], weights=sizes))

    return Churn(spread(1, 0), spread(LAST, 0), spread(LAST, LAST - 1))


def _hits(views: list[str]) -> Floats:
    """Mean over the views, each a string of 0 and 1: [n]."""
    mean: Floats = np.array([[int(mark) for mark in view] for view in views], dtype=np.float64).mean(axis=0)
    return mean


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of lineage."""

    name: str
    drift: float
    """Mean movement of a suite's truth in an update."""
    step: float
    """Standard deviation of an update's noise; of ease it is 1."""
    kept: float
    """Part of an item's noise that the next update keeps; 1: a random walk."""
    headline: bool = True

    def simulated(self) -> dict[str, float]:
        """The churn that these lineages have."""
        before, after = (self.variance(count) for count in (LAST - 1, LAST))
        r = (1 + self.kept * before) / math.sqrt((1 + before) * (1 + after))
        first, last = (math.atan(math.sqrt(v)) / math.pi for v in (self.variance(1), after))
        return asdict(Churn(math.sqrt(first), math.sqrt(last), math.sqrt(math.acos(r) / math.pi)))

    def variance(self, updates: int) -> float:
        return self.step**2 * sum(self.kept ** (2 * number) for number in range(updates))


MOVES_MORE = Churn(math.sqrt(0.066), math.sqrt(0.119), math.nan)
"""Chains in which 6.6% of all answers differ from the base after one update, and 11.9% after LAST."""


def kinds(measured: Churn) -> tuple[Kind, ...]:
    (step, kept), (large, much) = noise_of(measured), noise_of(MOVES_MORE)
    return (
        Kind("slow drift", -0.004, step, kept),
        Kind("random walk", 0.0, step, 1.0),
        Kind("answers that move more", -0.004, large, much, headline=False),
    )


def noise_of(churn: Churn) -> tuple[float, float]:
    """Step and kept part of an AR(1) with this churn against the base."""
    first, last = (math.tan(math.pi * spread**2) ** 2 for spread in (churn.first, churn.last))
    ratio = last / first

    def excess(kept: float) -> float:
        return sum(kept ** (2 * number) for number in range(LAST)) - ratio

    return math.sqrt(first), float(optimize.brentq(excess, 0.0, 1.0))


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    name: str
    truth: Floats
    """[suites]: true share of right answers, minus the base's."""
    noise: NDArray[np.float32]
    """[suites, items]"""
    variance: float
    """Of the noise."""
    all: tuple[ItemMarks, ...]
    """By suite; the first `World.sealed` items are sealed, and `judged` has the others."""
    judged: tuple[ItemMarks, ...]


class World:
    """Suites of ``items`` items each."""

    def __init__(self, items: int, kind: Kind, rng: np.random.Generator) -> None:
        self.kind, self.rng = kind, rng
        margin = SMALL_MARGIN if items < SMALL else None
        self.suites = tuple(
            Suite(name=f"suite{i}", task="classification", data="items", margin=margin) for i in range(SUITES)
        )
        self.sealed = np.arange(items // SEALED)
        self._ease = rng.standard_normal((SUITES, items), dtype=np.float32)
        self._ids = np.arange(items).astype(str)
        self.base = self._model("base", np.zeros(SUITES), np.zeros_like(self._ease), 0.0)

    def updated(self, parent: Model, truth: Floats, name: str) -> Model:
        """A model after another update of ``parent``, with a given truth."""
        noise = self.kind.kept * parent.noise
        noise += self.kind.step * self.rng.standard_normal(noise.shape, dtype=np.float32)
        return self._model(name, truth, noise, self.kind.kept**2 * parent.variance + self.kind.step**2)

    def _model(self, name: str, truth: Floats, noise: NDArray[np.float32], variance: float) -> Model:
        level = ndtri(np.clip(0.5 + truth, 0.01, 0.99)) * math.sqrt(1 + variance)
        right = (self._ease + level[:, None].astype(np.float32) + noise > 0).astype(np.float64)[:, :, None]
        first = len(self.sealed)
        everything = tuple(ItemMarks(self._ids, hits, None) for hits in right)
        judged = tuple(ItemMarks(self._ids[first:], hits[first:], None) for hits in right)
        return Model(name, truth, noise, variance, everything, judged)
