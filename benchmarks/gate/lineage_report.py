"""Many lineages at once, their figures, and the table of ``ratchet bench gate --lineage``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.command import show_table
from benchmarks.gate.counting import share
from benchmarks.gate.lineage import Course, Lineage
from benchmarks.gate.lineage_world import Churn, Kind, kinds, read_churn
from benchmarks.machine import machine
from benchmarks.processes import in_processes
from core.progress import track
from core.settings.updates import Gate
from updater.gate.suite_items import SEALED

SIZES = (240, 570, 2000)
"""Items of a suite, before a quarter is sealed: the two sizes of the built-in suites, and the default limit."""
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Task:
    """One lineage to be simulated; deterministic."""

    items: int
    kind: Kind
    updates: int
    seed: int
    settings: Gate

    def run(self) -> Course:
        rng = np.random.default_rng([self.seed, self.items])
        return Lineage(self.items, self.kind, self.settings, rng).run(self.updates)


def run(
    settings: Gate, *, lineages: int, updates: int, sizes: Sequence[int] = SIZES, workers: int | None = None
) -> dict[str, Any]:
    """Simulate ``lineages`` lineages for each size and kind. Returns the figures; the first ones are of all sizes, and
    of the kinds with the measured churn."""
    started = time.monotonic()
    measured = read_churn()
    cells = [(size, kind) for kind in kinds(measured) for size in sizes]
    tasks = [Task(size, kind, updates, seed, settings) for size, kind in cells for seed in range(lineages)]
    courses = track(in_processes(Task.run, tasks, workers=workers), "lineages", total=len(tasks))
    groups = [list(islice(courses, lineages)) for _ in cells]
    rows = [row_of(group, settings.margin) for group in groups]
    total = row_of([course for group in groups for course in group if course.kind.headline], settings.margin)
    return {
        "lineage_false_accepts": total["lineage_false_accepts"]["rate"],
        "harmful_releases": total["harmful_releases"],
        "mean_loss_stopped": total["mean_loss_stopped"]["rate"],
        "harmless_passed": total["harmless_passed"]["rate"],
        "total": total,
        "cells": [
            {"items": size, "sealed": size // SEALED, "kind": kind.name, **row}
            for (size, kind), row in zip(cells, rows, strict=True)
        ],
        "churn": churn_of(measured, {kind for _, kind in cells}),
        "updates": updates,
        "margin": settings.margin,
        "mean_margin": settings.mean_margin,
        "alpha": settings.alpha,
        "seconds": round(time.monotonic() - started, 1),
        "machine": machine(),
    }


def churn_of(measured: Churn, simulated: set[Kind]) -> dict[str, Any]:
    return {"measured": asdict(measured), **{kind.name: {**asdict(kind), **kind.simulated()} for kind in simulated}}


def row_of(courses: Sequence[Course], harm: float) -> dict[str, Any]:
    """Figures of some lineages. Intervals are exact for independent events; ``by_lineage`` is an interval that draws
    whole lineages, whose events depend on each other."""

    def rate(event: str, of: str, *, other: bool = False) -> dict[str, Any]:
        pairs = np.array([(course.counts[event], course.counts[of]) for course in courses])
        if other:
            pairs[:, 0] = pairs[:, 1] - pairs[:, 0]
        return {**share(*(int(value) for value in pairs.sum(axis=0))), "by_lineage": interval(pairs)}

    return {
        "lineages": len(courses),
        "lineage_false_accepts": share(sum(course.false_accept(harm) for course in courses), len(courses)),
        "harmful_releases": rate("harmful", "releases"),
        "mean_loss_stopped": rate("mean_loss_passed", "mean_loss", other=True),
        "mean_loss_stopped_by_mean": rate("mean_loss_mean", "mean_loss", other=True),
        "harmless_passed": rate("harmless_passed", "harmless"),
        "harmless_passed_suites": rate("harmless_suites", "harmless"),
        "harmless_passed_mean": rate("harmless_mean", "harmless"),
        "edge_passed": rate("edge_passed", "edge"),
        "released": rate("releases", "proposed"),
        "audits_failed": rate("audits_failed", "audits"),
        "audits_failed_falsely": rate("audits_failed_falsely", "harmless_audits"),
        "worst_standing": max(course.standing for course in courses),
        "truth_at_end": float(np.mean([course.truth for course in courses])),
    }


def interval(pairs: np.ndarray) -> list[float] | None:
    """95% bootstrap interval of a ratio of sums over lineages; None if there were no events. ``pairs``: counts and
    totals, [lineages, 2]."""
    if not pairs[:, 1].any():
        return None
    drawn = pairs[np.random.default_rng(0).integers(len(pairs), size=(RESAMPLES, len(pairs)))].sum(axis=1)
    drawn = drawn[drawn[:, 1] > 0]
    return [float(edge) for edge in np.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975))]


def show(figures: dict[str, Any]) -> None:
    table = Table("kind", "items", "false lineages", "harmful releases", "mean loss stopped", "harmless passed",
                  "edge passed", title=f"Lineages of {figures['updates']} updates on re-used items")  # fmt: skip
    for row in figures["cells"]:
        table.add_row(row["kind"], str(row["items"]), *_cells(row))
    total = figures["total"]
    table.add_row("measured churn", "all", *_cells(total))
    failed, falsely, released = (total[name] for name in ("audits_failed", "audits_failed_falsely", "released"))
    note = f"{released['count']} of {released['of']} updates were released, with the measured churn; "
    note += f"{failed['count']} of {failed['of']} audits failed, {falsely['count']} of them without a loss"
    show_table(table, figures, note)


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        *(f"{row[name]['count']}/{row[name]['of']}" for name in ("lineage_false_accepts", "harmful_releases")),
        *(_rate(row[name]) for name in ("mean_loss_stopped", "harmless_passed", "edge_passed")),
    ]


def _rate(found: dict[str, Any]) -> str:
    """With the wider of both intervals: without an event, lineages seem to agree perfectly."""
    low, high = found["by_lineage"]
    return f"{found['rate']:.1%}\n({100 * min(low, found['low']):.0f}-{100 * max(high, found['high']):.0f})"
