"""``ratchet bench continual``: methods of continual learning side by side on a stream, at equal compute.

Every CLIP recipe learns eight updates in a row; the best ten do so in five orders. `--bases` does it on several bases.
`--family vlm` has every VLM recipe learn to answer about four domains in turn: clothes, digits, tiles, icons. What
is there is not done again: stop it, and call it again. `docs/benchmarks/continual` holds the results and how to read
them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.continual import question_exam, questions
from benchmarks.continual.chain import Unit
from benchmarks.continual.lead import leads
from benchmarks.continual.orders import ORDERS
from benchmarks.continual.outcomes import read_course, read_reference
from benchmarks.continual.plots import all_plots
from benchmarks.continual.protocol import STANDARDS, Protocol
from benchmarks.continual.report import Chains, figures, read_chains, standard_of
from benchmarks.continual.run_tuning import tune
from benchmarks.continual.runner import Runner, best
from benchmarks.continual.second_base import NAME as SECOND
from benchmarks.continual.second_base import second_base
from benchmarks.continual.stream import UPDATES, Stream, load_stream, prepare
from benchmarks.continual.table import markdown
from core.digests import digest12, digest_json
from core.errors import ConfigError
from core.progress import progress_log
from core.settings import Settings
from serving.engines.clip_base import ClipBase, load_base
from serving.engines.vlm.vlm_base import VlmBase, load_vlm_base
from updater.recipes import Family, load_recipe, recipe_names
from updater.training.checkpoint import write_json


@dataclass(frozen=True)
class Stage:
    """Training data and evaluation of a family."""

    prepare: Callable[[Path], None]
    load: Callable[[Path, Protocol], Stream | questions.QuestionStream]
    base: Callable[[Path, str], ClipBase | VlmBase]
    protocol: Protocol
    updates: int
    orders: int
    tables: str = ""


FAMILIES: Mapping[Family, Stage] = {
    "clip": Stage(prepare, load_stream, load_base, Protocol(), len(UPDATES), len(ORDERS)),
    "vlm": Stage(
        questions.prepare, questions.load_questions, load_vlm_base, questions.PROTOCOL, len(questions.UPDATES),
        question_exam.ORDERS, "vlm",
    ),
}  # fmt: skip
FAST = ("naive", "replay", "default")
FAST_UPDATES = 5
BEST = 10
SIZES = {
    "gflops": "memory-adjusted GFLOPs of an update, teacher passes included",
    "replay": "pairs of earlier updates that an update may use",
    "reference": "pairs of the base's own domains that every update of a chain may use",
    "items": "items of a suite",
}
"""Fields of the protocol with flags on the command line."""


@dataclass
class Wanted:
    """The requested runs. ``methods``: all by default."""

    family: Family = "clip"
    methods: Sequence[str] = ()
    bases: Sequence[str] = ()
    """Names of bases, the installation's by default; the tables are of the first."""
    orders: int = 0
    """0: all that the family has."""
    seeds: int = 1
    updates: int = 0
    """0: the whole stream."""
    minutes: float = float("inf")
    jobs: int = 0
    report_only: bool = False
    tune: bool = False
    """Only choose rates and weights, on the first base."""
    again: bool = False
    out: Path | None = None


def methods_of(family: Family) -> list[str]:
    """Every recipe of a family that comes with Ratchet, except those that search on the gate's suites: they would see
    more data than the others.
    """
    recipes = map(load_recipe, recipe_names())
    return [recipe.name for recipe in recipes if recipe.family == family and not recipe.merge.search]


def run(settings: Settings, wanted: Wanted, protocol: Protocol | None = None) -> dict[str, Any]:
    """Run what is missing, write tables and plots, and return the figures.

    Raises:
        ConfigError: a method is not known.
        PackageError: data cannot be obtained.
        RatchetError: with ``report_only``, and nothing was run yet.
    """
    began, known, family = time.monotonic(), methods_of(wanted.family), FAMILIES[wanted.family]
    wanted = replace(
        wanted,
        methods=wanted.methods or known,
        orders=wanted.orders or family.orders,
        updates=wanted.updates or family.updates,
    )
    protocol = protocol or family.protocol
    unknown = sorted(set(wanted.methods) - set(known))
    if unknown:
        raise ConfigError(
            f"there is no {wanted.family.upper()} recipe {unknown[0]!r}.", f"There are: {', '.join(known)}."
        )
    if wanted.tune and wanted.family != "clip":
        raise ConfigError("there are no questions to tune a VLM's recipes by.", "Leave out --tune.")
    if not wanted.report_only:
        family.prepare(settings.home)
    stream = family.load(settings.home, protocol)
    deadline = began + 60 * wanted.minutes
    outcomes: dict[str, dict[str, Any]] = {}
    chains: dict[str, Chains] = {}
    for base in wanted.bases or (getattr(settings.base, wanted.family),):
        if base == SECOND and not wanted.report_only:
            second_base(settings.home)
        own = protocol.on(base)
        key = digest12(digest_json([family.base(settings.home, base).digest, own.digest, stream.digest]))
        results = settings.home / "bench" / "continual" / key
        if not wanted.report_only:
            for name in wanted.methods if wanted.again else ():
                shutil.rmtree(results / "units" / name, ignore_errors=True)
            jobs = wanted.jobs or len(os.sched_getaffinity(0))
            runner = Runner(settings.home, base, results, own, wanted.updates, jobs, deadline)
            if wanted.tune:
                tune(runner, wanted.methods)
                return {}
            _run(runner, wanted)
        chains[base] = read_chains(results, wanted.methods, wanted.orders, wanted.seeds, wanted.updates)
        outcomes[base] = figures(results, chains[base], wanted.methods, wanted.updates, own)
    lead = leads(chains)
    outcome = next(iter(outcomes.values())) | {
        "bases": {
            base: {
                **{key: each[key] for key in ("zero_shot", "methods", "untrained", "protocol")},
                "lead": leads({base: chains[base]}) if len(chains) > 1 else lead,
            }
            for base, each in outcomes.items()
        },
        "orders": list(ORDERS[: wanted.orders]),
        "lead": lead,
    }
    _write(outcome, wanted.out or settings.home / "bench" / "continual" / family.tables)
    return outcome


def _run(runner: Runner, wanted: Wanted) -> None:
    """Run every method once, then, if there is time, the best ones in all orders with all seeds."""
    if not runner.run([Unit(name) for name in wanted.methods]):
        return progress_log.info("the time is over; call again to go on")
    reference = read_reference(runner.results)

    def score(name: str) -> float | None:
        course = read_course(runner.results, Unit(name), runner.updates, reference)
        return float(course.trajectory(reference).gm[-1]) if course else None

    compared = [name for name in wanted.methods if name in STANDARDS]
    chosen = list(dict.fromkeys([*compared, *best(score, wanted.methods, BEST)]))
    # All orders first: a run that is stopped early then shows every order with one seed.
    more = [
        Unit(name, order, seed) for seed in range(wanted.seeds) for order in range(wanted.orders) for name in chosen
    ]
    if not runner.run(more):
        progress_log.info("the time is over; call again to go on")
    return None


def _write(outcome: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", outcome)
    drawings = all_plots(outcome) if outcome["methods"] else {}
    (folder / "README.md").write_text(markdown(outcome) + _pictures(drawings))
    for name, drawing in drawings.items():
        (folder / name).write_text(drawing)
    progress_log.info(f"tables and plots are in {folder}")


def _pictures(drawings: dict[str, str]) -> str:
    return "".join(f"\n![{name.partition('.')[0]}]({name})\n" for name in drawings)


def show(outcome: dict[str, Any]) -> None:
    title = f"After {outcome['updates']} updates, points against zero-shot"
    table = Table("method", "learned (A_KA)", "kept (A_ZS)", "geometric mean", "MAF", "steps", "seconds", title=title)
    rows = {**outcome["methods"], **outcome["untrained"]}
    for name, m in rows.items():
        spans = [m["intervals"][key] for key in ("a_ka", "a_zs", "gm")]
        cells = [f"{i['value']:+.1f} [dim]({i['low']:+.1f} to {i['high']:+.1f})[/dim]" for i in spans]
        table.add_row(name, *cells, f"{m['maf']:,.0f}", str(m["steps"]), f"{m['seconds']:.0f}")
    for name, reason in outcome["failed"].items():
        table.add_row(name, reason)
    Console().print(table)
    keys = (
        "a_ka_delta",
        "a_zs_delta",
        "geometric_mean",
        "geometric_mean_delta",
        "gm_without_largest",
        "maf",
        "seconds",
    )
    line = {
        "methods": {name: {key: m[key] for key in keys} for name, m in rows.items()},
        "gm_without_largest": outcome["methods"].get(standard_of(outcome["methods"]), {}).get("gm_without_largest"),
        "lead": {name: lead["gm"] for name, lead in outcome["lead"].items()},
        "bases": list(outcome["bases"]),
        **{key: outcome[key] for key in ("orders", "zero_shot", "failed", "updates", "origin")},
    }
    print(json.dumps(line), flush=True)


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="ratchet bench continual", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=list(FAMILIES), default="clip", help="the recipes of which models (clip)")
    parser.add_argument("--only", type=lambda text: text.split(","), help="these methods, with commas between them")
    parser.add_argument(
        "--bases", type=lambda text: text.split(","), default=[], help="bases, `vit` among them (the installation's)"
    )
    parser.add_argument(
        "--orders",
        type=int,
        default=0,
        help=f"orders for the best methods: {', '.join(ORDERS)} (all; of a VLM the first {question_exam.ORDERS})",
    )
    parser.add_argument("--seeds", type=int, default=1, help="seeds for the best methods (1)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop cleanly after about so many")
    parser.add_argument("--jobs", type=int, default=0, help="processes, one core each (all cores)")
    for name, what in SIZES.items():
        standard, other = (getattr(family.protocol, name) for family in FAMILIES.values())
        shown = f"{standard:g}" if standard == other else f"{standard:g}, of a VLM {other:g}"
        parser.add_argument(f"--{name}", type=type(standard), help=f"{what}, at most ({shown})")
    parser.add_argument("--tune", action="store_true", help="choose rates and weights first: five trials a method")
    parser.add_argument("--report", action="store_true", help="only tables and plots of what is there")
    parser.add_argument("--again", action="store_true", help="throw away what is there of these methods first")
    parser.add_argument("--out", type=Path, help="folder for tables and plots (default: that of the results)")
    parser.add_argument(
        "--fast", action="store_true", help=f"{', '.join(FAST)} over {FAST_UPDATES} updates: 10 minutes"
    )
    options = parser.parse_args(arguments)
    if options.fast and options.family != "clip":
        parser.error("--fast is of CLIP recipes")
    wanted = Wanted(
        family=options.family,
        methods=options.only or (FAST if options.fast else ()),
        bases=options.bases,
        orders=1 if options.fast else options.orders,
        seeds=1 if options.fast else options.seeds,
        updates=FAST_UPDATES if options.fast else 0,
        minutes=options.minutes,
        jobs=options.jobs,
        report_only=options.report,
        tune=options.tune,
        again=options.again,
        out=options.out,
    )
    sizes = {name: value for name in SIZES if (value := getattr(options, name)) is not None}
    outcome = run(settings, wanted, replace(FAMILIES[options.family].protocol, **sizes))
    if outcome:
        show(outcome)
