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
from benchmarks.continual.tuning import (
    FILE,
    ORDER,
    UPDATES,
    Place,
    Trial,
    choose,
    factor,
    is_inside,
    next_place,
)
from core.progress import progress_log
from updater.recipes import load_recipe

NAIVE = "naive"
"""End of the names of the deliberately bad examples."""


def tune(runner: Runner, methods: Sequence[str], file: Path = FILE) -> dict[str, list[Trial]]:
    """Run the missing trials, round by round, and record those of the methods whose trials are complete."""
    recipes = {name: load_recipe(name) for name in methods if not name.endswith(NAIVE)}
    runner = replace(runner, results=runner.results / "tuning", updates=UPDATES)
    done: dict[str, list[Trial]] = {name: [] for name in recipes}
    while wanted := {name: place for name, recipe in recipes.items() if (place := next_place(recipe, done[name]))}:
        if not runner.run([Unit(name, ORDER, trial=place) for name, place in wanted.items()]):
            progress_log.info("the time is over; call again to go on")
            break
        for name, place in wanted.items():
            trial = _trial(runner, name, place)
            if trial is None:  # it failed: the runner has logged why
                del recipes[name]
            else:
                done[name].append(trial)
    complete = {name: done[name] for name, recipe in recipes.items() if not next_place(recipe, done[name])}
    table = Table("method", "factors of rate and second knob: GM (A_ZS)", "inside")
    for name, each in complete.items():
        chosen = choose(name, each)
        cells = [f"{factor(t.rate):g}, {factor(t.second):g}: {t.gm:.1f} ({t.a_zs:+.1f})" for t in each]
        bold = [f"[bold]{cell}[/bold]" if t is chosen else cell for cell, t in zip(cells, each, strict=True)]
        table.add_row(name, "; ".join(bold), "yes" if is_inside(recipes[name], each) else "no")
    Console().print(table)
    known = json.loads(file.read_text()) if file.is_file() else {}
    lines = [f' "{name}": {json.dumps(rows)}' for name, rows in sorted({**known, **complete}.items())]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(json.dumps({"trials": complete}), flush=True)
    return complete


def _trial(runner: Runner, name: str, place: Place) -> Trial | None:
    """The result of a trial on the suites that its updates teach and on those of no update; None if it is missing."""
    reference = read_reference(runner.results)
    course = read_course(runner.results, Unit(name, ORDER, trial=place), UPDATES, reference)
    if course is None:
        return None
    taught = replace(reference, adaptation=tuple(each for each in reference.adaptation if each in course.order))
    draws = resampled({"base": [reference.base], name: [course.hits[-1]]}, taught)
    a_zs = draws.difference("a_zs", name, "base")
    gm = 100 * float(draws.of("gm")[0, draws.names.index(name)])
    return Trial(*place, round(gm, 2), round(a_zs.value, 2), round(a_zs.high, 2))
