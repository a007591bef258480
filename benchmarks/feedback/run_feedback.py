"""``ratchet bench feedback``: what callers report is learned and takes bad releases back, and bad callers cannot harm.

Three parts. *Learning*: a live installation, callers who correct a share of its answers, a reviewer, and updates until
one is released; parts are killed meanwhile, and every report is accounted for. The same with a tenth of the callers
hostile. *Rollback*: worse releases forced live under load, until the guard takes them back. *Simulation*: the guard's
test on 200 streams of reports of each kind.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.command import bench_parser, show_table
from benchmarks.feedback.learning import Learned, Size, learn
from benchmarks.feedback.rollback import TakenBack, take_back
from benchmarks.feedback.simulation import BEFORE, CALLERS, EQUAL, HOSTILE, WORSE, simulate
from benchmarks.machine import machine
from core.ledger.wrong_answers import ALPHA
from core.progress import progress_log
from core.settings import Settings

PARTS: Final = ("learning", "hostile", "rollback", "simulation")
QUICK: Final = Size(answers=400, share=0.05, audits=0.05, updates=1, gflops=100.0, stream=300)
KEEPS: Final = 0.7


def run(
    settings: Settings, folder: Path, parts: Collection[str] = PARTS, size: Size | None = None, runs: int = 3,
    share: float = 1.0, streams: int = 200, most: int = 10_000, rate: float = 0.05,
) -> dict[str, Any]:  # fmt: skip
    """Run the parts, each with a home of its own in the folder, where the logs stay. Returns the figures; those of
    parts that were not run are None.

    Args:
        runs: releases that are taken back.
        share: of the answers that callers report in the part rollback.
        streams: simulated, of each kind.
        most: reported answers of a simulated release.
        rate: wrong share of the simulated incumbent's reported answers.
    """
    wanted = size or Size()
    honest = learn(settings, folder / "learning", wanted, with_hostile=False) if "learning" in parts else None
    hostile = learn(settings, folder / "hostile", wanted, with_hostile=True) if "hostile" in parts else None
    taken = take_back(settings, folder / "rollback", runs, share) if "rollback" in parts else []
    simulated = simulate(streams, most, rate) if "simulation" in parts else {}
    return _figures(honest, hostile, taken, simulated) | {
        "streams": streams, "most": most, "rate": rate, "reports_before": BEFORE, "callers": CALLERS, "alpha": ALPHA,
        "machine": machine(),
    }  # fmt: skip


def _figures(
    honest: Learned | None, hostile: Learned | None, taken: list[TakenBack], simulated: dict[str, Any]
) -> dict[str, Any]:
    lived = [each for each in (honest, hostile) if each is not None]

    def total(name: str) -> int | None:
        return sum(each.accounts[name] for each in lived) if lived else None

    kept = None
    if honest is not None and hostile is not None and honest.gain > 0:
        kept = round(hostile.gain / honest.gain, 3)
    needed = [each.needed for each in taken if each.needed is not None]
    return {
        "gain": honest and honest.gain, "gain_interval": honest and honest.interval,
        "failed": sum(each.failed for each in lived) + sum(each.failed for each in taken),
        "mixed": sum(each.mixed for each in lived),
        **{name: total(name) for name in ("acknowledged", "stored", "lost", "double", "unacknowledged")},
        "hostile_released": hostile and hostile.hostile_released, "honest_gain_kept": kept,
        "answers_to_rollback": [float(each) for each in (np.median(needed), min(needed), max(needed))] if needed else (
            simulated[WORSE]["answers"] if simulated else None),
        "simulated_to_rollback": simulated[WORSE]["answers"] if simulated else None,
        "false_rollbacks": simulated[EQUAL]["share"] if simulated else None,
        "hostile_rollbacks": simulated[HOSTILE]["share"] if simulated else None,
        "learning": honest and asdict(honest), "hostile": hostile and asdict(hostile),
        "rollbacks": [asdict(each) for each in taken], "scenarios": simulated,
    }  # fmt: skip


def violations(figures: dict[str, Any]) -> list[str]:
    wrong = [f"{name} {figures[name]}" for name in ("failed", "mixed", "lost", "double", "hostile_released")
             if figures[name]]  # fmt: skip
    if figures["gain"] is not None and figures["gain_interval"][0] <= 0:
        wrong.append(f"gain {figures['gain']}")
    if figures["honest_gain_kept"] is not None and figures["honest_gain_kept"] < KEEPS:
        wrong.append(f"honest_gain_kept {figures['honest_gain_kept']}")
    return wrong + (
        [f"false_rollbacks {figures['false_rollbacks']}"] if (figures["false_rollbacks"] or 0) > ALPHA else []
    )


def show(figures: dict[str, Any]) -> None:
    console = Console()
    if figures["learning"] or figures["hostile"]:
        console.print(_learning_table(figures))
    if figures["rollbacks"]:
        console.print(_rollback_table(figures))
    note = f"{figures['rate']:.0%} of the incumbent's {BEFORE} reported answers are wrong, of {CALLERS} callers"
    show_table(_simulation_table(figures), figures, note if figures["scenarios"] else "")


def _simulation_table(figures: dict[str, Any]) -> Table:
    table = Table(
        "release", "taken back", "95%", "reported answers until then (5%, 95%)", title="The guard on simulated reports"
    )
    for name, row in figures["scenarios"].items():
        low, high = row["interval"]
        median, *ends = row["answers"] or (0, 0, 0)
        until = f"{median:.0f} ({ends[0]:.0f}, {ends[1]:.0f})" if row["answers"] else ""
        table.add_row(name, f"{row['taken_back']} of {figures['streams']}", f"{low:.1%} to {high:.1%}", until)
    return table


def _learning_table(figures: dict[str, Any]) -> Table:
    table = Table("", "honest callers", "a tenth hostile", title="Learning from what callers report")
    names = ("answers", "corrections", "audits", "before", "gain", "interval", "failed", "mixed", "refused", "verdicts",
             "hostile_published", "hostile_released", "accounts", "seconds")  # fmt: skip
    for name in names:
        table.add_row(name, *(str(side[name]) if (side := figures[key]) else "" for key in ("learning", "hostile")))
    return table


def _rollback_table(figures: dict[str, Any]) -> Table:
    table = Table("wrong before", "added", "reports until the rollback", "needed", title="Worse releases, forced live")
    for row in figures["rollbacks"]:
        table.add_row(f"{row['incumbent_rate']:.1%}", f"{row['added']:.1%}", str(row["answers"]), str(row["needed"]))
    return table


def main(settings: Settings, arguments: Sequence[str]) -> None:
    """Ends with status 1 when something failed, was mixed or lost, or harm was done."""
    parser = bench_parser("feedback", __doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="all by default")
    parser.add_argument("--quick", action="store_true", help="a few hundred answers and one short update")
    parser.add_argument("--answers", type=int, default=Size.answers, help="of /v1/classify while callers report")
    parser.add_argument("--share", type=float, default=Size.share, help="of the answers that are corrected (0.01)")
    parser.add_argument("--audits", type=float, default=Size.audits, help="share of answers that are audited (0.04)")
    parser.add_argument("--gflops", type=float, default=Size.gflops, help="budget of an update (2,300)")
    parser.add_argument("--runs", type=int, default=3, help="releases that are taken back (3)")
    parser.add_argument(
        "--reported", type=float, default=1.0, help="share of answers reported in the part rollback (1)"
    )
    parser.add_argument("--streams", type=int, default=200, help="simulated streams of each kind (200)")
    parser.add_argument("--most", type=int, default=10_000, help="reported answers of a simulated release (10,000)")
    parser.add_argument(
        "--rate", type=float, default=0.05, help="wrong share of the simulated incumbent's reported answers (0.05)"
    )
    parser.add_argument("--home", type=Path, default=None, help="folder for homes and logs, to look at them afterwards")
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else Size(options.answers, options.share, options.audits, gflops=options.gflops)
    with tempfile.TemporaryDirectory(prefix="ratchet-feedback-", ignore_cleanup_errors=True) as temporary:
        figures = run(
            settings, options.home or Path(temporary), options.parts, size, 1 if options.quick else options.runs,
            options.reported, options.streams, options.most, options.rate,
        )  # fmt: skip
    show(figures)
    if wrong := violations(figures):
        progress_log.error(", ".join(wrong))
        raise SystemExit(1)
