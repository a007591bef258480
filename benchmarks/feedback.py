"""``ratchet bench feedback``: how many reported answers the guard needs, and how often it takes back a good release.

Simulated reports, decided by the guard's own test after every ten: callers report answers as right or wrong, the
incumbent's before the release, the release's after it. Some callers are hostile, and report every answer of the new
release as wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table
from scipy.stats import binomtest

from benchmarks.command import bench_parser, show_table
from benchmarks.machine import machine
from core.ledger.feedback import CallerReports
from core.settings import Settings
from serving.releases.feedback_guard import ALPHA, Reports, highest_rate, p_value, without_loudest

CALLERS = 30
BEFORE = 1000
"""Reported answers of the incumbent."""
EVERY = 10
SCENARIOS = {"equal": (0.0, 0.0), "equal, a tenth hostile": (0.0, 0.1), "5 points worse": (0.05, 0.0)}
"""Added rate of wrong answers, and share of hostile callers."""


def answers_to_rollback(
    random: np.random.Generator, rate: float, added: float, hostile: float, most: int
) -> int | None:
    """Reported answers until the release is taken back; None: not within ``most``."""
    bound = highest_rate(Reports(int(random.binomial(BEFORE, rate)), BEFORE))
    callers = random.integers(CALLERS, size=most)
    wrong = (random.random(most) < rate + added) | (callers < hostile * CALLERS)
    for reported in range(EVERY, most + 1, EVERY):
        counts = np.bincount(callers[:reported], minlength=CALLERS)
        wrongs = np.bincount(callers[:reported], weights=wrong[:reported], minlength=CALLERS)
        rows = [CallerReports(str(n), int(wrongs[n]), int(counts[n])) for n in np.flatnonzero(counts)]
        if p_value(Reports.sum(without_loudest(rows)), bound) < ALPHA / 2:
            return reported
    return None


def run(streams: int, most: int, rate: float) -> dict[str, Any]:
    rows = {}
    for index, (name, (added, hostile)) in enumerate(SCENARIOS.items()):
        random = np.random.default_rng(index)
        needed = [answers_to_rollback(random, rate, added, hostile, most) for _ in range(streams)]
        taken = [each for each in needed if each is not None]
        low, high = binomtest(len(taken), streams).proportion_ci(0.95)
        rows[name] = {
            "taken_back": len(taken), "share": len(taken) / streams, "interval": [float(low), float(high)],
            "answers": [float(each) for each in np.quantile(taken, [0.5, 0.05, 0.95])] if taken else None,
        }  # fmt: skip
    return {
        "answers_to_rollback": rows["5 points worse"]["answers"], "false_rollbacks": rows["equal"]["share"],
        "hostile_rollbacks": rows["equal, a tenth hostile"]["share"], "alpha": ALPHA, "streams": streams, "most": most,
        "rate": rate, "reports_before": BEFORE, "callers": CALLERS, "scenarios": rows, "machine": machine(),
    }  # fmt: skip


def show(figures: dict[str, Any]) -> None:
    table = Table(
        "release", "taken back", "95%", "reported answers until then (5%, 95%)", title="The guard on feedback"
    )
    for name, row in figures["scenarios"].items():
        low, high = row["interval"]
        median, *ends = row["answers"] or (0, 0, 0)
        until = f"{median:.0f} ({ends[0]:.0f}, {ends[1]:.0f})" if row["answers"] else ""
        table.add_row(name, f"{row['taken_back']} of {figures['streams']}", f"{low:.1%} to {high:.1%}", until)
    note = f"{figures['rate']:.0%} of the incumbent's {BEFORE} reported answers are wrong, of {CALLERS} callers"
    show_table(table, figures, note)


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = bench_parser("feedback", __doc__)
    parser.add_argument("--streams", type=int, default=200, help="of each kind")
    parser.add_argument("--most", type=int, default=10_000, help="reported answers of a release")
    parser.add_argument(
        "--rate", type=float, default=0.05, help="share of the incumbent's reported answers that are wrong"
    )
    options = parser.parse_args(arguments)
    show(run(options.streams, options.most, options.rate))
