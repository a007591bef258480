"""``ratchet bench continual --tune``: choose the rate and the weight of each method on the tuning pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.continual.chain import Unit
from benchmarks.continual.outcomes import read_course, read_reference
from benchmarks.continual.runner import Runner
from benchmarks.continual.tuning import FILE, ORDER, UPDATES, Factors, trials
from ops.errors import RatchetError
from ops.progress import say
from updater.recipes import load_recipe

NAIVE = "naive"
"""Stays the bad example that it is."""


def tune(runner: Runner, methods: Sequence[str], file: Path = FILE) -> dict[str, Factors]:
    """Run what is missing of all trials, and write what was chosen of the methods of which all are there."""
    methods = [name for name in methods if name != NAIVE]
    runner = replace(runner, results=runner.results / "tuning", updates=UPDATES)
    units = [Unit(name, ORDER, trial=trial) for name in methods for trial in range(len(trials(load_recipe(name))))]
    if not runner.run(units):
        say("the time is over; call again to go on")
    scores = {name: _scores(runner, name) for name in methods}
    table = Table("method", *("rate, weight" for _ in range(5)), title="GM on the tuning suites after three updates")
    factors: dict[str, Factors] = {}
    for name, values in scores.items():
        if None in values:
            continue
        best = max(range(len(values)), key=lambda trial: values[trial] or 0.0)
        factors[name] = trials(load_recipe(name))[best]
        cells = [f"{r:g}, {w:g}: {v:.1f}" for (r, w), v in zip(trials(load_recipe(name)), values, strict=True)]
        table.add_row(name, *(f"[bold]{cell}[/bold]" if n == best else cell for n, cell in enumerate(cells)))
    Console().print(table)
    known = json.loads(file.read_text()) if file.is_file() else {}
    lines = [f' "{name}": {json.dumps(list(pair))}' for name, pair in sorted({**known, **factors}.items())]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(json.dumps({"tuned": factors, "trials": scores}), flush=True)
    return factors


def _scores(runner: Runner, name: str) -> list[float | None]:
    """The GM of each trial, in points; None of one that is not there."""
    try:
        reference = read_reference(runner.results)
    except RatchetError:  # nothing was run yet
        return [None]
    scores: list[float | None] = []
    for trial in range(len(trials(load_recipe(name)))):
        course = read_course(runner.results, Unit(name, ORDER, trial=trial), UPDATES, reference)
        scores.append(None if course is None else round(100 * float(course.trajectory(reference).gm[-1]), 2))
    return scores
