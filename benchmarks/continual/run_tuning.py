"""``ratchet bench continual --tune``: choose the rate and the weight of each method on the tuning pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.continual.chain import Unit
from benchmarks.continual.intervals import resampled
from benchmarks.continual.outcomes import read_course, read_reference
from benchmarks.continual.runner import Runner
from benchmarks.continual.tuning import FILE, ORDER, UPDATES, Trial, choose, trials
from core.errors import RatchetError
from core.progress import progress_log
from updater.recipes import load_recipe

NAIVE = "naive"
"""Remains a deliberately bad example."""


def tune(runner: Runner, methods: Sequence[str], file: Path = FILE) -> dict[str, list[Trial]]:
    """Run the missing trials, and record those of the methods whose trials are complete."""
    methods = [name for name in methods if name != NAIVE]
    runner = replace(runner, results=runner.results / "tuning", updates=UPDATES)
    units = [Unit(name, ORDER, trial=trial) for name in methods for trial in range(len(trials(load_recipe(name))))]
    if not runner.run(units):
        progress_log.info("the time is over; call again to go on")
    complete = {name: done for name in methods if (done := _trials(runner, name))}
    title = f"GM and A_ZS on the tuning suites after {UPDATES} updates"
    table = Table("method", *("rate, weight" for _ in range(5)), title=title)
    for name, done in complete.items():
        chosen = choose(name, done)
        cells = [f"{t.rate:g}, {t.weight:g}: {t.gm:.1f} ({t.a_zs:+.1f})" for t in done]
        bold = [f"[bold]{cell}[/bold]" if t is chosen else cell for cell, t in zip(cells, done, strict=True)]
        table.add_row(name, *bold)
    Console().print(table)
    known = json.loads(file.read_text()) if file.is_file() else {}
    lines = [f' "{name}": {json.dumps(rows)}' for name, rows in sorted({**known, **complete}.items())]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(json.dumps({"trials": complete}), flush=True)
    return complete


def _trials(runner: Runner, name: str) -> list[Trial]:
    """Results of the trials; empty if one is missing."""
    try:
        reference = read_reference(runner.results)
    except RatchetError:  # nothing was run yet
        return []
    done: list[Trial] = []
    for trial, (rate, weight) in enumerate(trials(load_recipe(name))):
        course = read_course(runner.results, Unit(name, ORDER, trial=trial), UPDATES, reference)
        if course is None:
            return []
        draws = resampled({"base": [reference.base], name: [course.hits[-1]]}, reference)
        a_zs = draws.difference("a_zs", name, "base")
        gm = 100 * float(course.trajectory(reference).gm[-1])
        done.append(Trial(rate, weight, round(gm, 2), round(a_zs.value, 2), round(a_zs.high, 2)))
    return done
