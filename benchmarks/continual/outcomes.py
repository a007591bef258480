"""Results of finished units: hits by item, suite and update, and costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.continual.chain import Unit, updates_done
from benchmarks.continual.exam import ZERO_SHOT
from benchmarks.continual.metrics import Floats, Trajectory, trajectory
from benchmarks.continual.nearest import NAME as NEAREST
from core.errors import RatchetError
from updater.training.checkpoint import read_json

Hits = dict[str, Floats]
"""By suite [items]: the share of an item's views that were answered correctly."""


@dataclass(frozen=True)
class Reference:
    """The base's answers, and the kinds of suites."""

    base: Hits
    adaptation: tuple[str, ...]
    held_out: tuple[str, ...]
    nearest: Hits
    """The base's answers, except for suites where nearest class means answer."""
    classes: frozenset[str] = frozenset()
    outside: tuple[str, ...] = ()
    """Held-out suites of domains that the reference pool does not contain."""
    named: Hits = field(default_factory=dict)
    """The base's answers to suites that are asked among the names of all domains."""
    alike: Mapping[str, int] = field(default_factory=dict)
    """By suite, pictures that were left out because they look like a training picture."""
    unseen: tuple[str, ...] = ()
    """Suites of classes that no update trains on, of domains that one does."""


@dataclass(frozen=True)
class Course:
    """A unit's updates. ``hits`` has one entry more than ``rows``: the base's."""

    unit: Unit
    hits: tuple[Hits, ...]
    rows: tuple[dict[str, Any], ...]
    named: tuple[Hits, ...] = ()
    """As ``hits``, of suites that are asked among the names of all domains."""

    @property
    def order(self) -> list[str]:
        return [row["update"] for row in self.rows]

    def path(self, suites: Sequence[str]) -> Floats:
        """Scores [updates + 1, suites]."""
        return np.array([[hits[name].mean() for name in suites] for hits in self.hits])

    def trajectory(self, reference: Reference) -> Trajectory:
        return trajectory(self.path(reference.adaptation), self.path(reference.held_out))

    def total(self, key: str) -> float:
        return float(sum(row["cost"][key] for row in self.rows))

    def most(self, key: str) -> float:
        return float(max(row["cost"][key] for row in self.rows))


def read_reference(results: Path) -> Reference:
    """Read the reference; fields that earlier protocols lacked are empty. Raises RatchetError when nothing was run
    yet.
    """
    zero_shot = read_json(results / ZERO_SHOT)
    if not isinstance(zero_shot, dict):
        raise RatchetError(
            f"there are no results in {results}.",
            "Run `ratchet bench continual` without --report, with more minutes, or unpack results there.",
        )
    roles: dict[str, str] = zero_shot["roles"]
    base = unpacked(zero_shot["hits"])
    return Reference(
        base,
        tuple(name for name, role in roles.items() if role == "adaptation"),
        tuple(name for name, role in roles.items() if role == "held-out"),
        base | unpacked(zero_shot[NEAREST]),
        frozenset(name for name, task in zero_shot.get("tasks", {}).items() if task == "classification"),
        tuple(zero_shot.get("outside", ())),
        unpacked(zero_shot.get("named", {})),
        zero_shot.get("alike", {}),
        tuple(name for name, role in roles.items() if role == "unseen"),
    )


def read_course(results: Path, unit: Unit, updates: int, reference: Reference) -> Course | None:
    """The first ``updates`` updates of a unit; None unless all of them exist."""
    rows = updates_done(results, unit.recipe, unit)[:updates]
    if len(rows) < updates:
        return None
    hits, named = (tuple(unpacked(row.get(key, {})) for row in rows) for key in ("hits", "named"))
    return Course(unit, (reference.base, *hits), tuple(rows), (reference.named, *named))


def unpacked(hits: dict[str, list[str]]) -> Hits:
    return {name: np.mean([_bits(view) for view in views], axis=0) for name, views in hits.items()}


def _bits(view: str) -> NDArray[np.float64]:
    return np.array([float(letter) for letter in view])
