"""The benchmark's course, its flags, and what it prints."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.command import show_table
from benchmarks.gate.stock import ARCHIVE
from benchmarks.lifetime.churn import churn_of_chain
from benchmarks.lifetime.outcomes import Source, read_sources
from benchmarks.lifetime.report import FigureRow, draw, row_of
from benchmarks.lifetime.stream import GAIN3, OTHER_GAINS, Course, Rules, Stream, lessons_of
from benchmarks.lifetime.world import FORGOTTEN, make_world
from benchmarks.machine import machine
from benchmarks.processes import in_processes
from core.errors import ConfigError
from core.progress import progress_log, track
from core.settings import Settings
from core.settings.updates import Gate
from updater.training.checkpoint import write_json

UPDATES = 40
MOST_UPDATES = 400
RULES = (
    Rules(),
    Rules("no memory suites", memory=False),
    Rules("no best release", best=False),
    Rules("gain by recall", ranks=False),
    Rules("a candidate each trigger", waiting=False),
    Rules("all of these", memory=False, best=False, ranks=False, waiting=False),
)
IDLE, IDLE_UPDATES = "no update gains", 4
"""Not rules, but a stream without gains: whatever it releases is a false release. It is shorter: no release takes its
held-out items, so each look costs more than the one before."""


@dataclass(frozen=True, slots=True)
class Task:
    """One stream to be simulated."""

    rules: Rules
    gains: tuple[float, ...]
    updates: int
    seed: int
    forgotten: float
    settings: Gate

    def run(self, sources: Mapping[str, Source]) -> Course:
        """Deterministic; tasks with the same seed have the same world and lessons."""
        world_rng, rng = (np.random.default_rng([self.seed, number]) for number in range(2))
        world = make_world(sources, world_rng)
        lessons = lessons_of(world, self.updates, self.gains, world_rng)
        return Stream(world, self.rules, self.settings, rng, self.forgotten).run(lessons)


def run(
    settings: Settings,
    *,
    updates: int = UPDATES,
    streams: int = 2,
    rules: Sequence[Rules] = RULES,
    forgotten: float = FORGOTTEN,
    outcomes: Path = ARCHIVE,
    workers: int | None = None,
) -> dict[str, Any]:
    """Simulate ``streams`` streams for each of the rules, and those without a gain. Returns the figures.

    Raises ConfigError when there are no outcomes.
    """
    started = time.monotonic()
    gains = (GAIN3, *OTHER_GAINS)

    def tasks(which: Rules, given: tuple[float, ...], count: int) -> list[Task]:
        return [Task(which, given, count, seed, forgotten, settings.gate) for seed in range(streams)]

    groups = {each.name: tasks(each, gains, updates) for each in rules}
    groups[IDLE] = tasks(rules[0], (0.0,), min(updates, IDLE_UPDATES))
    wanted = [task for group in groups.values() for task in group]
    courses = track(
        in_processes(_run, wanted, workers=workers, prepare=partial(_prepare, outcomes)), "streams", total=len(wanted)
    )
    rows = [row_of(name, list(islice(courses, len(group)))) for name, group in groups.items()]
    *real, idle = rows
    return {
        "released_within_12_triggers_gain3": real[0]["gain3"]["rate"],
        "kept_of_learned": real[0]["kept"],
        "harmful_released": real[0]["harmful_released"],
        "harmful": real[0]["harmful"],
        **{key: real[0][key] for key in ("audits", "audits_failed", "audits_failed_wrongly")},
        **_churn(outcomes),
        "released_without_gain": idle["by_gain"]["0"]["rate"],
        "alpha_mean": real[0]["alpha_mean"],
        "alpha_most": real[0]["alpha_most"],
        "forgotten": forgotten,
        "detect": settings.gate.detect,
        "updates": updates,
        "rules": rows,
        "seconds": round(time.monotonic() - started, 1),
        "machine": machine(),
    }


def _churn(outcomes: Path) -> dict[str, float]:
    world_rng, rng = (np.random.default_rng([0, number]) for number in range(2))
    churn = churn_of_chain(make_world(read_sources(outcomes), world_rng), 8, rng)
    return {f"churn_after_{updates}": round(churn[updates - 1], 4) for updates in (1, 8)}


_SOURCES: dict[str, Source] = {}


def _prepare(outcomes: Path) -> None:
    _SOURCES.update(read_sources(outcomes))


def _run(task: Task) -> Course:
    return task.run(_SOURCES)


def show(figures: Mapping[str, Any]) -> None:
    table = Table("rules", "released, gain 3", "triggers", "kept", "learned", "harmful released", "audits failed",
                  "looks", "alpha",
                  title=f"{figures['updates']} updates, {figures['rules'][0]['streams']} streams")  # fmt: skip
    for row in figures["rules"]:
        table.add_row(*_cells(row))
    show_table(table, figures)


def _cells(row: FigureRow) -> list[str]:
    released = row["gain3"] if row["gain3"]["of"] else row["by_gain"]["0"]
    return [
        row["rules"],
        f"{released['count']}/{released['of']} ({released['low']:.0%} to {released['high']:.0%})",
        "-" if row["triggers_gain3"] is None else f"{row['triggers_gain3']:.1f}",
        "-" if row["kept"] is None else f"{row['kept']:.0%}",
        f"{row['learned_points']:.0f}",
        f"{row['harmful_released']}/{row['harmful']}",
        f"{row['audits_failed']}/{row['audits']}",
        str(row["looks"]),
        f"{row['alpha_mean']:.3f} (most {row['alpha_most']:.3f})",
    ]


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="ratchet bench lifetime", description="A simulated stream of updates.")
    parser.add_argument("--updates", type=int, default=UPDATES, help=f"of a stream (2 to {MOST_UPDATES})")
    parser.add_argument("--streams", type=int, default=2, help="for each set of rules (2)")
    parser.add_argument("--forgotten", type=float, default=FORGOTTEN,
                        help=f"share of what was learned that any other update loses ({FORGOTTEN})")  # fmt: skip
    parser.add_argument("--only", action="store_true", help="the gate as it is, without the rules that are compared")
    parser.add_argument("--outcomes", type=Path, default=ARCHIVE, help="archive or folder of `ratchet bench gate`")
    parser.add_argument("--out", type=Path, help="folder of results; by default home/bench/lifetime")
    options = parser.parse_args(arguments)
    if not (2 <= options.updates <= MOST_UPDATES and 1 <= options.streams <= 100 and 0.0 <= options.forgotten <= 1.0):
        raise ConfigError(
            f"--updates {options.updates} --streams {options.streams} --forgotten {options.forgotten}: "
            "one is out of bounds.",
            f"Ask for 2 to {MOST_UPDATES} updates, 1 to 100 streams, and a share between 0 and 1.",
        )
    out = options.out or settings.home / "bench" / "lifetime"
    progress_log.info(
        f"{options.streams} streams of {options.updates} updates for each set of rules; results go to {out}"
    )
    figures = run(
        settings, updates=options.updates, streams=options.streams, rules=RULES[:1] if options.only else RULES,
        forgotten=options.forgotten, outcomes=options.outcomes,
    )  # fmt: skip
    write_json(out / "results.json", figures)
    draw([row for row in figures["rules"] if row["gain3"]["of"]], out / "released.png")
    show(figures)
