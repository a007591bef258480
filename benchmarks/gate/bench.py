"""The benchmark's course, flags and output."""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.gate import counting, lineage_report, resample
from benchmarks.gate.cases import Case, Outcomes, Rule, has_ranks, hits_of
from benchmarks.gate.margin import TRIES, beside, parents_of
from benchmarks.gate.plans import BAD, CHAIN, DRIFT, GOOD, GatePlan, plans
from benchmarks.gate.plot import draw
from benchmarks.gate.power import power
from benchmarks.gate.redrawn import figures_of, redraw
from benchmarks.gate.trial import Trial, Workshop, run_all
from benchmarks.machine import machine
from core.errors import ConfigError
from core.progress import progress_log, track
from core.settings import Settings
from updater.training.checkpoint import write_json

Figures = dict[str, Any]
FEWEST = CHAIN + len(BAD)
LINEAGES, UPDATES = 20, 40


@dataclass(frozen=True, slots=True)
class Extent:
    """Amounts of everything."""

    bad: int
    good: int
    parents: int
    tries: int
    """Scales for each target of a parent."""
    deals: int
    draws: int
    """Item sets for each question about drawn items."""


FULL = Extent(40, 40, 10, TRIES, 25, 1000)
FAST = Extent(FEWEST, 2 * len(GOOD), 2, 1, 5, 100)


def run(settings: Settings, extent: Extent, out: Path) -> Figures:
    """Train, judge and redraw; returns the figures and leaves results.json and power.png in ``out``.

    Raises RatchetError when base or data cannot be obtained.
    """
    return measure(Workshop.open(settings, out), plans(extent.bad, extent.good), extent, Rule.of(settings.gate))


def measure(workshop: Workshop, wanted: Sequence[GatePlan], extent: Extent, rule: Rule) -> Figures:
    """The figures of some plans in a workshop."""
    started = time.monotonic()
    out, draws = workshop.out, extent.draws
    trials = dict(run_all(workshop, wanted))
    cases = [each for plan in wanted if (each := case(workshop, plan, trials)) is not None]
    margin = list(at_margin(workshop, wanted, trials, extent, rule))
    shown = {name: population.shown for name, population in workshop.populations.items()}
    redrawn = redraw([*cases, *margin], shown, rule, extent.deals, seed=6)
    wide = figures_of(list(track(redrawn, "redrawn item sets", total=extent.deals * (len(cases) + len(margin)))))
    sizes = {name: population.held_out for name, population in workshop.populations.items()}
    own = {one.name: one.rows({s.name: np.arange(sizes[s.name]) for s in one.suites}) for one in cases}
    rows = counting.rows(cases, [own[one.name] for one in cases], rule)
    drifted = counting.drift(rows, rule, own)
    harmful = [row.case for row in rows if row.truth == "harmful"]
    fine = [row.case for row in rows if row.truth == "good"]
    drawn = resampled(harmful, fine, rule, sizes, draws)
    curves = power(fine, rule, draws, seed=5)
    shipped: dict[str, list[int]] = defaultdict(list)
    for one in workshop.populations.values():
        if one.suite.role == "retention":
            shipped[one.suite.task].append(one.held_out)
    plot = draw(curves, shipped, out / "power.png") if curves else None
    total = counting.counted(rows)
    figures = {
        "false_accepts_at_margin": wide["false_accepts"]["rate"],
        "false_rejects_gain3": wide["false_rejects_gain3"]["rate"],
        "drift_caught_before_harm": drifted["caught_before_harm"],
        "redrawn": wide,
        "false_accepts": total["false_accepts"],
        "false_rejects": total["false_rejects"],
        "false_accepts_resampled": drawn["harmful"]["passed"],
        "false_rejects_resampled": counting.others(drawn["good"]["passed"]),
        "slow_drift_caught_at": drifted["caught_at"],
        "total": total,
        "kinds": counting.by_kind(rows),
        "drift": drifted,
        "resampled": drawn,
        "not_trained": {name: trial.error for name, trial in trials.items() if trial.error},
        "level": rule.level,
        "items": {name: [sizes[name], shown[name], one.n] for name, one in workshop.populations.items()},
        "seconds": round(time.monotonic() - started, 1),
        "seconds_of_candidates": round(sum(trial.seconds for trial in trials.values()), 1),
        "machine": machine(),
    }
    results = out / "results.json"
    write_json(results, {**figures, "power": curves, "candidates": [_about(row) for row in rows]})
    return {**figures, "results": str(results), "plot": str(plot)}


def case(workshop: Workshop, plan: GatePlan, trials: Mapping[str, Trial]) -> Case | None:
    """A candidate's outcomes with its incumbent's and the base's; None if training refused it."""
    after, base = trials[plan.name], trials["base"]
    if after.error:
        return None
    before = trials[plan.incumbent] if plan.incumbent else base
    suites = workshop.suites(plan.domain)
    sides: list[Outcomes] = [trial.answers for trial in (base, before, after)]
    if not all(has_ranks(side[suite.name]) for suite in suites for side in sides):  # some were kept as hits
        alike: dict[int, Outcomes] = {
            id(side): {suite.name: hits_of(suite, side[suite.name]) for suite in suites} for side in sides
        }
        sides = [alike[id(side)] for side in sides]
    return Case(plan.name, plan.kind, suites, *sides)


def at_margin(
    workshop: Workshop, wanted: Sequence[GatePlan], trials: dict[str, Trial], extent: Extent, rule: Rule
) -> Iterator[Case]:
    """Scaled candidates near the margin; their trials are added to ``trials``."""
    trained = [plan for plan in wanted if not trials[plan.name].error]
    for parent in parents_of(trained, extent.parents):

        def loses(plan: GatePlan, parent: GatePlan = parent) -> float:
            trials[plan.name] = workshop.of_scaled(plan, parent)
            return _case(workshop, plan, trials).beyond(rule)

        whole = _case(workshop, parent, trials)
        none = replace(whole, after=whole.base).beyond(rule)
        for plan in beside(parent, loses, whole.beyond(rule), none, extent.tries):
            yield _case(workshop, plan, trials)


def _case(workshop: Workshop, plan: GatePlan, trials: Mapping[str, Trial]) -> Case:
    trained = case(workshop, plan, trials)
    assert trained is not None, f"{plan.name} was trained"
    return trained


def resampled(
    harmful: Sequence[Case], fine: Sequence[Case], rule: Rule, sizes: dict[str, int], count: int
) -> dict[str, Any]:
    """Verdicts on ``count`` drawn item sets each: of harmful and good candidates, under no change, at the margin."""

    questions = {
        "harmful": resample.draws(harmful, rule, sizes, count, seed=1),
        "good": resample.draws(fine, rule, sizes, count, seed=2),
        "no_change": resample.draws_unchanged(fine, rule, sizes, count, seed=3),
        "at_margin": resample.draws_at_margin(fine, rule, sizes, count, seed=4),
    }
    verdicts = {name: list(track(draws, f"item sets, {name}", total=count)) for name, draws in questions.items()}
    return {
        **{name: counting.tally(drawn) for name, drawn in verdicts.items()},
        "harmful_by_kind": {
            kind: counting.tally(one for one in verdicts["harmful"] if one.kind == kind)["passed"]
            for kind in dict.fromkeys(one.kind for one in verdicts["harmful"])
        },
        "suite_at_margin_passed": {
            name: counting.share(sum(one.edge_passed for one in own), len(own))
            for name, own in _by_edge(verdicts["at_margin"]).items()
        },
    }


def _by_edge(drawn: Sequence[resample.Drawn]) -> dict[str, list[resample.Drawn]]:
    return {"all": list(drawn)} | {name: [one for one in drawn if one.edge == name] for name in {o.edge for o in drawn}}


def _about(row: counting.SuiteCount) -> Figures:
    return {
        "name": row.case.name,
        "kind": row.case.kind,
        "truth": row.truth,
        "beyond_margin": row.beyond,
        "gained": row.case.gained,
        "lost": {s.name: row.case.lost(s) for s in row.case.suites if s.role == "retention"},
        "outcome": row.judged.outcome,
        "held_by": [
            *(r.name for r in row.judged.results if r.role == "retention" and r.decision != "passed"),
            *([] if row.judged.gained else ["gain"]),
        ],
    }


def show(figures: Figures) -> None:
    table = Table("kind", "harmful", "idle", "good", "passed", "rejected", "undecided", "false accepts",
                  "false rejects", title="Candidates: truth, verdicts, errors")  # fmt: skip
    for kind, row in {**figures["kinds"], "all": figures["total"]}.items():
        counts = [str(row[key]) for key in ("harmful", "idle", "good", "passed", "rejected", "inconclusive")]
        errors = [f"{row[key]['count']}/{row[key]['of']}" for key in ("false_accepts", "false_rejects")]
        table.add_row(kind, *counts, *errors)
    sets = Table("item sets of", "passed", "rejected", "undecided", "gain shown", "all kept",
                 title=f"Resampled items (level of a look {figures['level']:.2%})")  # fmt: skip
    resampled = figures["resampled"]
    for name in ("harmful", "good", "no_change", "at_margin"):
        shares = [resampled[name][key]["rate"] for key in counting.TALLIED]
        sets.add_row(name.replace("_", " "), *("-" if rate is None else f"{rate:.1%}" for rate in shares))
    wide = figures["redrawn"]
    losses = Table("true loss beyond the margin", "passed", "candidates", title="Redrawn item sets, by true loss")
    gains = Table("true gain", "passed", "candidates", title="and by true gain, every loss inside half the margin")
    for shown, key in ((losses, "by_loss"), (gains, "by_gain")):
        for row in wide[key]:
            edges = f"{100 * row['from']:+.1f} to {100 * row['to']:+.1f} points"
            shown.add_row(edges, _rate(row["passed"]), str(row["candidates"]))
    drifted = figures["drift"]
    within = sum(step["within_margin_of_incumbent"] for step in drifted["steps"])
    lines = {
        "False accepts, up to 2 points beyond the margin": _rate(wide["false_accepts"]),
        "False rejects, gain of 3 points and loss inside half the margin": _rate(wide["false_rejects_gain3"]),
        "False accepts": f"{_rate(figures['false_accepts'])}, resampled {_rate(figures['false_accepts_resampled'])}",
        "False rejects": f"{_rate(figures['false_rejects'])}, resampled {_rate(figures['false_rejects_resampled'])}",
        "A suite exactly at its margin passed": _rate(resampled["suite_at_margin_passed"]["all"]),
        "Slow drift": f"caught at update {drifted['caught_at']}, harmful from {drifted['harmful_from']}; {within} of "
        f"{CHAIN} updates stay inside the margin of their incumbent, which alone would keep "
        f"{drifted['let_in_without_base']}",
        "Plot": figures["plot"],
        "Results": figures["results"],
    }
    console = Console()
    console.print(table, losses, gains, sets)
    for name, line in lines.items():
        console.print(f"{name}: {line}", highlight=False, soft_wrap=True)
    print(json.dumps(figures), flush=True)


def _rate(share: Mapping[str, Any]) -> str:
    if share["rate"] is None:
        return "-"
    return f"{share['count']}/{share['of']} ({share['low']:.1%} to {share['high']:.1%})"


def lineage(settings: Settings, lineages: int, updates: int, out: Path) -> None:
    if not (1 <= lineages <= 1000 and 1 <= updates <= 400):
        raise ConfigError(
            f"--lineages {lineages} --updates {updates}: one is out of bounds.",
            "Ask for 1 to 1000 lineages and 1 to 400 updates.",
        )
    progress_log.info(f"{lineages} lineages of {updates} updates for each kind and size; results go to {out}")
    figures = lineage_report.run(settings.gate, lineages=lineages, updates=updates)
    write_json(out / "lineage.json", figures)
    lineage_report.show(figures)


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="ratchet bench gate", description="How often the gate is wrong.")
    parser.add_argument("--candidates", type=int, default=40, help=f"bad ones, and as many good ones (>= {FEWEST})")
    parser.add_argument("--fast", action="store_true", help="a candidate or two of each kind, and few item sets")
    parser.add_argument("--draws", type=int, default=FULL.draws, help="item sets for each question")
    parser.add_argument("--deals", type=int, default=FULL.deals, help="redrawn item sets of each candidate")
    parser.add_argument("--parents", type=int, default=FULL.parents, help="bad ones that are scaled to the margin")
    parser.add_argument("--out", type=Path, help="folder of outcomes and results; by default home/bench/gate")
    parser.add_argument("--lineage", action="store_true", help="simulated lineages on items that are used again, alone")
    parser.add_argument("--lineages", type=int, default=LINEAGES, help=f"of each kind and size ({LINEAGES})")
    parser.add_argument("--updates", type=int, default=UPDATES, help=f"of a lineage ({UPDATES})")
    options = parser.parse_args(arguments)
    out = options.out or settings.home / "bench" / "gate"
    if options.lineage:
        lineage(settings, options.lineages, options.updates, out)
        return
    if not FEWEST <= options.candidates <= 150 or min(options.draws, options.deals, options.parents) < 1:
        raise ConfigError(
            f"--candidates {options.candidates} --draws {options.draws} --deals {options.deals} "
            f"--parents {options.parents}:"
            " too few or too many.",
            f"Ask for {FEWEST} to 150 candidates (every kind, and {CHAIN} updates of {DRIFT}), and some of the rest.",
        )
    given = Extent(options.candidates, options.candidates, options.parents, TRIES, options.deals, options.draws)
    extent = FAST if options.fast else given
    progress_log.info(f"{extent.bad} bad and {extent.good} good candidates; outcomes are kept in {out / 'outcomes'}")
    show(run(settings, extent, out))
