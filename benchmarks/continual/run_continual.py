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
from benchmarks.continual.orders import CHAINS, ORDERS
from benchmarks.continual.outcomes import read_course, read_reference
from benchmarks.continual.own_data import STEPS, OwnData, own_stream
from benchmarks.continual.plan import budget_of
from benchmarks.continual.plots import all_plots
from benchmarks.continual.protocol import LARGER, STANDARDS, Protocol
from benchmarks.continual.ray_tasks import ray_tasks
from benchmarks.continual.report import BASE, ends, figures, read_chains, standard_of
from benchmarks.continual.run_tuning import tune
from benchmarks.continual.runner import Runner, best, here
from benchmarks.continual.second_base import NAME as SECOND
from benchmarks.continual.second_base import second_base
from benchmarks.continual.stream import UPDATES, Stream, load_stream, prepare
from benchmarks.continual.table import markdown
from benchmarks.continual.tuning import TRIALS
from benchmarks.continual.variants import ABLATIONS, FRAMED, VARIANTS, has_frame
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
    chains: int
    tables: str = ""


FAMILIES: Mapping[Family, Stage] = {
    "clip": Stage(prepare, load_stream, load_base, Protocol(), len(UPDATES), len(CHAINS)),
    "vlm": Stage(
        questions.prepare, questions.load_questions, load_vlm_base, questions.PROTOCOL, len(questions.UPDATES),
        question_exam.ORDERS, "vlm",
    ),
}  # fmt: skip
FAST = ("naive", "replay", "default")
FAST_UPDATES = 4
FAST_ITEMS = 120
BEST = 10
"""Methods that all chains are run of, besides the default and its ablations."""
IN_FRAME = 16
"""Methods that are run in the default's frame, too."""
COSTLY = ("full", "ln-fit", "codyra", "nusa-cl")
"""Methods that take few steps at the plain budget, or many in their papers."""
NOISY = 3
"""Methods that are run under noise, besides the default and :data:`WEIGHTING`."""
WEIGHTING = "agreement"
"""The recipe against wrong captions."""
CLEAN = "clean"
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
    chains: int = 0
    """Of the best methods; 0: all that the family has."""
    budgets: Sequence[float] = ()
    """Larger ones, as multiples, that the best methods of the first base run at as well."""
    noise: Sequence[tuple[str, float]] = ()
    """Fields of the protocol, and shares, that a few methods of the first base run with as well."""
    updates: int = 0
    """0: the whole stream."""
    minutes: float = float("inf")
    jobs: int = 0
    report_only: bool = False
    tune: bool = False
    """Only choose rates and weights, on the first base."""
    again: bool = False
    data: OwnData | None = None
    """In place of the benchmark's stream of a CLIP."""
    ray: str = ""
    """Address of a Ray cluster whose nodes run the units; empty: this machine alone."""
    out: Path | None = None


def methods_of(family: Family) -> list[str]:
    """Every recipe of a family that comes with Ratchet, except those that search on the gate's suites: they would see
    more data than the others.
    """
    recipes = map(load_recipe, recipe_names())
    return [recipe.name for recipe in recipes if recipe.family == family and not recipe.merge.search]


def variants_of(family: Family) -> list[str]:
    """Recipes in the default's frame, ablations of the default, and points of WiSE-FT's curve."""
    if family != "clip":
        return []
    return [*(f"{name}.{FRAMED}" for name in methods_of(family) if has_frame(name)), *VARIANTS]


def run(settings: Settings, wanted: Wanted, protocol: Protocol | None = None) -> dict[str, Any]:
    """Run what is missing, write tables and plots, and return the figures.

    Raises:
        ConfigError: a method is not known.
        PackageError: data cannot be obtained.
        RatchetError: with ``report_only``, and nothing was run yet.
    """
    began, family = time.monotonic(), FAMILIES[wanted.family]
    known = [*methods_of(wanted.family), *variants_of(wanted.family)]
    wanted = replace(wanted, chains=wanted.chains or family.chains, updates=wanted.updates or family.updates)
    protocol = protocol or family.protocol
    unknown = sorted(set(wanted.methods) - set(known))
    if unknown:
        raise ConfigError(
            f"there is no {wanted.family.upper()} recipe {unknown[0]!r}.", f"There are: {', '.join(known)}."
        )
    if wanted.tune and wanted.data is not None:
        raise ConfigError("own data have no part to tune by.", "Leave out --tune: rates and weights are those chosen.")
    stream: Stream | questions.QuestionStream
    if wanted.data is not None:
        base = load_base(settings.home, (list(wanted.bases) or [settings.base.clip])[0])
        own = own_stream(settings.home, wanted.data, protocol)
        stream, wanted = own, replace(wanted, bases=[base.name], updates=len(own.updates))
        if protocol.gflops == Protocol.gflops:
            plans = settings.home / "bench" / "continual" / "plans" / own.digest[:12]
            budget = budget_of(base, load_recipe(STANDARDS[0]), STEPS, own, protocol, plans)
            protocol = replace(protocol, gflops=round(budget, 2))
    else:
        if not wanted.report_only:
            family.prepare(settings.home)
        stream = family.load(settings.home, protocol)
    start, processors = ray_tasks(wanted.ray) if wanted.ray else (here, len(os.sched_getaffinity(0)))

    def runner_of(base: str, budget: float = 1.0, noise: tuple[str, float] | None = None) -> Runner:
        own = protocol.on(base, budget)
        shown = stream
        if noise:
            field, share = noise
            own = replace(own, swapped=share) if field == "swapped" else replace(own, hostile=share)
            shown = family.load(settings.home, own)
        key = digest12(digest_json([family.base(settings.home, base).digest, own.digest, shown.digest]))
        return Runner(
            settings.home, base, settings.home / "bench" / "continual" / key, own, wanted.updates,
            wanted.jobs or processors, began + 60 * wanted.minutes, wanted.data, start,
        )  # fmt: skip

    shown = list(wanted.methods) or known
    bases = list(wanted.bases) or [getattr(settings.base, wanted.family)]
    if SECOND in bases and not wanted.report_only:
        second_base(settings.home)
    runners = {base: runner_of(base) for base in bases}
    larger = {budget: runner_of(bases[0], budget) for budget in wanted.budgets}
    noisy = {f"{share:.0%} {field}": runner_of(bases[0], noise=(field, share)) for field, share in wanted.noise}
    if wanted.tune:
        tune(runners[bases[0]], wanted.methods or methods_of(wanted.family))
        return {}
    if not wanted.report_only:
        for runner in (*runners.values(), *larger.values(), *noisy.values()) if wanted.again else ():
            for name in shown:
                shutil.rmtree(runner.results / "units" / name, ignore_errors=True)
        if not _run(list(runners.values()), list(larger.values()), list(noisy.values()), wanted):
            progress_log.info("the time is over; call again to go on")
    chains = {base: read_chains(each.results, shown, wanted.chains, wanted.updates) for base, each in runners.items()}
    outcomes = {
        base: figures(each.results, chains[base], shown, wanted.updates, each.protocol)
        for base, each in runners.items()
    }
    lead = leads(chains)
    outcome = next(iter(outcomes.values())) | {
        "bases": {
            base: {
                **{key: each[key] for key in ("zero_shot", "methods", "untrained", "protocol")},
                "lead": leads({base: chains[base]}) if len(chains) > 1 else lead,
            }
            for base, each in outcomes.items()
        },
        "orders": [ORDERS[order] for order, _ in CHAINS[: wanted.chains]],
        "lead": lead,
        "budgets": {
            f"{budget:g}": ends(read_chains(each.results, shown, 1, wanted.updates))
            for budget, each in {1.0: runners[bases[0]], **larger}.items()
            if each.results.is_dir()
        },
        "noise": {
            label: {"ends": ends(read), "lead": leads({bases[0]: read})}
            for label, each in {CLEAN: runners[bases[0]], **noisy}.items()
            if noisy and each.results.is_dir()
            for read in [read_chains(each.results, shown, 1, wanted.updates)]
        },
    }  # fmt: skip
    _write(outcome, wanted.out or settings.home / "bench" / "continual" / family.tables)
    return outcome


def _run(bases: Sequence[Runner], larger: Sequence[Runner], noisy: Sequence[Runner], wanted: Wanted) -> bool:
    """On the first base, run every method once, then the best ones in the default's frame, the ablations and the curve;
    then, on all bases, all chains of the best and of the ablations; then the best at larger budgets, and some under
    noise. Returns False when the time is over.
    """
    first, clip = bases[0], wanted.family == "clip"
    methods = list(wanted.methods) or methods_of(wanted.family)
    if not first.run([Unit(name) for name in methods]):
        return False
    reference = read_reference(first.results)

    def score(name: str) -> float | None:
        course = read_course(first.results, Unit(name), first.updates, reference)
        return float(course.trajectory(reference).gm[-1]) if course else None

    if not wanted.methods and clip:
        frames = [f"{name}.{FRAMED}" for name in best(score, methods, IN_FRAME) if has_frame(name)]
        methods = [*methods, *frames, *VARIANTS]
        if not first.run([Unit(name) for name in methods]):
            return False
    compared = [name for name in methods if name in STANDARDS or name in ABLATIONS]
    chosen = list(dict.fromkeys([*compared, *best(score, methods, BEST)]))
    # All methods of a chain first: a run that is stopped early then has whole chains.
    units = [Unit(name, *place) for place in CHAINS[: wanted.chains] for name in chosen]
    costly = [name for name in methods if name in COSTLY]
    afforded = [name for name in dict.fromkeys([*chosen, *costly]) if name not in ABLATIONS]
    plain = [name for name in methods if "." not in name]
    weighed = list(dict.fromkeys([*(n for n in plain if n in (*STANDARDS, WEIGHTING)), *best(score, plain, NOISY)]))
    return (
        all(each.run(units) for each in bases)
        and all(each.run([Unit(name) for name in afforded]) for each in larger)
        and all(each.run([Unit(name) for name in weighed]) for each in noisy)
    )


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
    standard = outcome["methods"].get(standard_of(outcome["methods"]), {})
    line = {
        "methods": {name: {key: m[key] for key in keys} | _means(m) for name, m in rows.items()},
        "default": outcome["lead"].get(BASE, {}),
        "gm_without_largest": standard.get("gm_without_largest"),
        "lead": outcome["lead"],
        "bases": list(outcome["bases"]),
        **{key: outcome[key] for key in ("orders", "zero_shot", "failed", "updates", "origin")},
    }
    print(json.dumps(line), flush=True)


def _means(method: dict[str, Any]) -> dict[str, Any]:
    """MTIL's and X-TAIL's means, of a method that has them."""
    return {key: method[key] for key in ("mtil", "xtail") if key in method}


def _noise(text: str) -> list[tuple[str, float]]:
    """Of the command line. Raises ValueError."""
    noise = [(field, float(share)) for field, _, share in (part.partition("=") for part in text.split(","))]
    if any(field not in ("swapped", "hostile") or not 0 < share <= 1 for field, share in noise):
        raise ValueError(text)
    return noise


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
        "--chains", type=int, default=0, help="chains of the best methods, an order and seed each (all)"
    )
    parser.add_argument(
        "--budgets", type=lambda text: [float(part) for part in text.split(",")], default=[],
        help=f"larger budgets for the best methods, as multiples, e.g. {','.join(f'{each:g}' for each in LARGER)}",
    )  # fmt: skip
    parser.add_argument(
        "--noise", type=_noise, default=[],
        help="shares of wrong captions in every update, e.g. swapped=0.1,swapped=0.3,hostile=0.2: some pairs have "
        "another one's caption, or are of a source that writes one caption under all its pictures",
    )  # fmt: skip
    own = parser.add_argument_group("your own base and data, in place of the benchmark's")
    own.add_argument("--base", help="a registered base, as of `ratchet base add`")
    own.add_argument("--stream", type=Path, nargs="+", help="data sets as `ratchet publish` reads them: an update each")
    own.add_argument(
        "--suite", type=Path, nargs="+", help="suites of the gate: one named after each data set, and others"
    )
    own.add_argument("--rehearse", type=Path, nargs="+", default=[], help="data of the base's own domains")
    parser.add_argument(
        "--ray", default="", help="address of a Ray cluster that runs the units; its nodes share the home"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop cleanly after about so many")
    parser.add_argument("--jobs", type=int, default=0, help="processes, one core each (all cores)")
    for name, what in SIZES.items():
        standard, other = (getattr(family.protocol, name) for family in FAMILIES.values())
        shown = f"{standard:g}" if standard == other else f"{standard:g}, of a VLM {other:g}"
        parser.add_argument(f"--{name}", type=type(standard), help=f"{what}, at most ({shown})")
    parser.add_argument("--tune", action="store_true", help=f"only choose rates and weights: {TRIALS} trials a method")
    parser.add_argument("--report", action="store_true", help="only tables and plots of what is there")
    parser.add_argument("--again", action="store_true", help="throw away what is there of these methods first")
    parser.add_argument("--out", type=Path, help="folder for tables and plots (default: that of the results)")
    parser.add_argument(
        "--fast",
        action="store_true",
        help=f"{', '.join(FAST)} over {FAST_UPDATES} updates, with suites of {FAST_ITEMS} items: 6 minutes",
    )
    options = parser.parse_args(arguments)
    if options.fast and options.family != "clip":
        parser.error("--fast is of CLIP recipes")
    if options.noise and (options.stream or options.family != "clip"):
        parser.error("--noise is of the benchmark's own pairs")
    if bool(options.stream) != bool(options.suite):
        parser.error("--stream and --suite go together: name suites for what is learned, and for what is kept")
    data = (
        OwnData(*(tuple(map(Path.absolute, each)) for each in (options.stream, options.suite, options.rehearse)))
        if options.stream
        else None
    )
    wanted = Wanted(
        family=options.family,
        methods=options.only or (FAST if options.fast else ()),
        bases=[options.base] if options.base else options.bases,
        data=data,
        ray=options.ray,
        chains=1 if options.fast else options.chains,
        budgets=options.budgets,
        noise=options.noise,
        updates=FAST_UPDATES if options.fast else 0,
        minutes=options.minutes,
        jobs=options.jobs,
        report_only=options.report,
        tune=options.tune,
        again=options.again,
        out=options.out,
    )
    sizes = {name: value for name in SIZES if (value := getattr(options, name)) is not None}
    if options.fast:
        sizes.setdefault("items", FAST_ITEMS)
    outcome = run(settings, wanted, replace(FAMILIES[options.family].protocol, **sizes))
    if outcome:
        show(outcome)
