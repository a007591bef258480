"""The benchmark's course, flags and output."""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gate import counting, lineage_report, mislabelled, resample
from benchmarks.gate.cases import Case, Rule, judged_of
from benchmarks.gate.margin import TRIES
from benchmarks.gate.plans import BAD, CHAIN, DRIFT, GOOD, NEW, plans, plans_mislabelled
from benchmarks.gate.plot import draw
from benchmarks.gate.power import power
from benchmarks.gate.redrawn import figures_of, redraw
from benchmarks.gate.stock import ARCHIVE, Stock, stored, trained
from benchmarks.gate.trial import Workshop
from benchmarks.machine import machine
from core.errors import ConfigError
from core.progress import progress_log, track
from core.settings import Settings
from updater.training.checkpoint import write_json

Figures = dict[str, Any]
FEWEST = CHAIN + len(BAD)
LINEAGES, UPDATES = 20, 40
MISLABELLED = 2 * len(NEW)


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
    mislabelled: int


FULL = Extent(40, 40, 10, TRIES, 25, 1000, MISLABELLED)
FAST = Extent(FEWEST, 2 * len(GOOD), 2, 1, 5, 100, 1)


def run(settings: Settings, extent: Extent, out: Path, outcomes: Path | None = None) -> Figures:
    """Judge and redraw; returns the figures and leaves results.json and power.png in ``out``. ``outcomes``: of the
    candidates of an earlier run; without it they are trained, as the mislabelled ones always are.

    Raises RatchetError when base or data cannot be obtained, or ``outcomes`` has none.
    """
    rule, wanted = Rule.of(settings.gate), plans(extent.bad, extent.good)
    if outcomes is None:
        stock = trained(Workshop.open(settings, out), wanted, extent.parents, extent.tries, rule)
    else:
        stock = stored(outcomes, wanted, extent.parents, rule)
    lies: Figures = {}
    if extent.mislabelled:
        workshop = Workshop.open(settings, out / "mislabelled", mislabelled=True)
        lies = mislabelled.measure(workshop, plans_mislabelled(extent.mislabelled), rule)
    return measure(stock, lies, extent, rule, out)


def measure(stock: Stock, lies: Figures, extent: Extent, rule: Rule, out: Path) -> Figures:
    """The figures of some candidates; ``lies`` are those of the mislabelled ones."""
    started = time.monotonic()
    cases, margin, items, draws = stock.cases, stock.margin, stock.items, extent.draws
    shown = {name: judged_of(one.shown) for name, one in items.items()}
    redrawn = redraw([*cases, *margin], shown, rule, extent.deals, seed=6)
    splits = list(track(redrawn, "redrawn item sets", total=extent.deals * (len(cases) + len(margin))))
    wide = figures_of(splits, rule.mean_margin)
    own = {one.name: one.own() for one in cases}
    rows = counting.rows(cases, list(own.values()), rule)
    scaled = counting.rows(margin, [one.own() for one in margin], rule)
    drifted = counting.drift(rows, rule, own)
    harmful = [row.case for row in rows if row.truth == "harmful"]
    fine = [row.case for row in rows if row.truth == "good"]
    drawn = resampled(harmful, fine, rule, draws)
    curves = power(fine, rule, draws, seed=5)
    shipped: dict[str, list[int]] = defaultdict(list)
    for suite in cases[0].suites:
        if suite.role == "retention":
            shipped[suite.task].append(cases[0].judged[suite.name])
    plot = draw(curves, shipped, out / "power.png") if curves else None
    total = counting.counted(rows)
    gains = {suite.name: (suite, one) for one in cases for suite in one.suites if suite.role == "gain"}
    figures = {
        "false_accepts_at_margin": wide["false_accepts"]["rate"],
        "false_rejects_gain3": wide["false_rejects_gain3"]["rate"],
        "drift_caught_before_harm": drifted["caught_before_harm"],
        "mean_loss_stopped": wide["mean_loss_stopped"]["rate"],
        "poisoned_gain_released": lies.get("released"),
        "redrawn": wide,
        "false_accepts": total["false_accepts"],
        "false_rejects": total["false_rejects"],
        "false_accepts_resampled": drawn["harmful"]["passed"],
        "false_rejects_resampled": counting.others(drawn["good"]["passed"]),
        "slow_drift_caught_at": drifted["caught_at"],
        "total": total,
        "total_with_scaled": counting.counted([*rows, *scaled]),
        "kinds": counting.by_kind([*rows, *scaled]),
        "drift": drifted,
        "resampled": drawn,
        "mislabelled": lies,
        "true_labels": {
            name: mislabelled.agreed(suite, one, rule.loss_level) for name, (suite, one) in sorted(gains.items())
        },
        "not_trained": dict(stock.not_trained),
        "level": rule.level,
        "mean_margin": rule.mean_margin,
        "items": {name: [one.served, one.shown, one.everything] for name, one in items.items()},
        "seconds": round(time.monotonic() - started, 1),
        "seconds_of_candidates": stock.seconds,
        "machine": machine(),
    }
    results = out / "results.json"
    write_json(results, {**figures, "power": curves, "candidates": [_about(row) for row in [*rows, *scaled]]})
    return {**figures, "results": str(results), "plot": str(plot)}


def resampled(harmful: Sequence[Case], fine: Sequence[Case], rule: Rule, count: int) -> dict[str, Any]:
    """Verdicts on ``count`` drawn item sets each: of harmful and good candidates, under no change, at the margin."""

    questions = {
        "harmful": resample.draws(harmful, rule, count, seed=1),
        "good": resample.draws(fine, rule, count, seed=2),
        "no_change": resample.draws_unchanged(fine, rule, count, seed=3),
        "at_margin": resample.draws_at_margin(fine, rule, count, seed=4),
    }
    verdicts = {name: list(track(draws, f"item sets, {name}", total=count)) for name, draws in questions.items()}
    return {
        **{name: counting.tally(drawn) for name, drawn in verdicts.items()},
        "harmful_by_kind": {
            kind: counting.tally(one for one in verdicts["harmful"] if one.kind == kind)["passed"]
            for kind in dict.fromkeys(one.kind for one in verdicts["harmful"])
        },
        "suite_at_margin_passed": {
            name: counting.clustered((one.name, one.edge_passed) for one in own)
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
        "mean_lost": row.case.mean_lost,
        "gained": row.case.gained,
        "lost": {s.name: row.case.lost(s) for s in row.case.suites if s.role == "retention"},
        "outcome": row.judged.outcome,
        "held_by": [*row.judged.unproven, *([] if row.judged.gained else ["gain"])],
    }


def show(figures: Figures) -> None:
    table = Table("kind", "harmful", "idle", "good", "passed", "rejected", "undecided", "false accepts",
                  "false rejects", title="Candidates: truth, verdicts, errors")  # fmt: skip
    for kind, row in {**figures["kinds"], "all": figures["total_with_scaled"]}.items():
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
    means = Table(
        "true mean loss", "passed", "candidates", title=f"and by true mean loss, {figures['mean_margin']:.1%} allowed"
    )
    for shown, key in ((losses, "by_loss"), (means, "by_mean"), (gains, "by_gain")):
        for row in wide[key]:
            edges = f"{100 * row['from']:+.1f} to {100 * row['to']:+.1f} points"
            shown.add_row(edges, _rate(row["passed"]), str(row["candidates"]))
    drifted = figures["drift"]
    within = sum(step["within_margin_of_incumbent"] for step in drifted["steps"])
    lies, everyone = figures["mislabelled"], figures["total_with_scaled"]
    lines = {
        "False accepts, up to 2 points beyond the margin": _rate(wide["false_accepts"]),
        "False rejects, gain of 3 points and losses inside half the margins": _rate(wide["false_rejects_gain3"]),
        "Mean loss beyond its margin stopped": f"{_rate(wide['mean_loss_stopped'])}; where every suite is inside its "
        f"margin {_rate(wide['mean_loss_stopped_suites_inside'])}",
        "False accepts on the suites' own items, with the scaled, up to 2 points beyond a margin": _rate(
            everyone["false_accepts_within_2_points"]
        ),
        "The same, further beyond": _rate(everyone["false_accepts_further"]),
        "False accepts": f"{_rate(figures['false_accepts'])}, resampled {_rate(figures['false_accepts_resampled'])}",
        "False rejects": f"{_rate(figures['false_rejects'])}, resampled {_rate(figures['false_rejects_resampled'])}",
        "A suite exactly at its margin passed": _rate(resampled["suite_at_margin_passed"]["all"]),
        "Slow drift": f"caught at update {drifted['caught_at']}, harmful from {drifted['harmful_from']}; {within} of "
        f"{CHAIN} updates stay inside the margin of their incumbent, which alone would keep "
        f"{drifted['let_in_without_base']}",
        "Mislabelled": f"{lies['passed']} of {lies['of']} pass the tests on their items, {lies['released']} of these "
        "where the base agrees with the labels"
        if lies
        else "not asked for",
        "Plot": figures["plot"],
        "Results": figures["results"],
    }
    console = Console()
    console.print(table, losses, means, gains, sets)
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
    parser.add_argument("--lineage", action="store_true", help="simulated lineages on items that are used again, alone")
    parser.add_argument("--lineages", type=int, default=LINEAGES, help=f"of each kind and size ({LINEAGES})")
    parser.add_argument("--updates", type=int, default=UPDATES, help=f"of a lineage ({UPDATES})")
    stored_help = (
        "judge stored outcomes, train nothing: an archive or folder; the repository's archive if none is named"
    )
    parser.add_argument("--outcomes", type=Path, nargs="?", const=ARCHIVE, metavar="PLACE", help=stored_help)
    lies_help = f"mislabelled ones, which are always trained: by default {MISLABELLED}, with --outcomes 0"
    parser.add_argument("--mislabelled", type=int, nargs="?", const=MISLABELLED, metavar="N", help=lies_help)
    parser.add_argument("--out", type=Path, help="folder of outcomes and results; by default home/bench/gate, and "
                        "its folder `stored` with --outcomes")  # fmt: skip
    options = parser.parse_args(arguments)
    out = options.out or settings.home / "bench" / "gate" / ("stored" if options.outcomes else "")
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
    lies = options.mislabelled if options.mislabelled is not None else 0 if options.outcomes else MISLABELLED
    given = Extent(options.candidates, options.candidates, options.parents, TRIES, options.deals, options.draws, lies)
    extent = replace(FAST, mislabelled=min(lies, FAST.mislabelled)) if options.fast else given
    progress_log.info(f"{extent.bad} bad and {extent.good} good candidates; results are kept in {out}")
    show(run(settings, extent, out, options.outcomes))
