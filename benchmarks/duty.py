"""``ratchet bench duty``: the cost of an update in training for the requests that are answered meanwhile.

A server under open-loop load at half of the measured capacity; next to it, in turns, nothing and a trainer: the real
process with the settings' priority, threads and duty cycle, which starts, takes steps for a phase, and is stopped with
a checkpoint from which the next phase continues. Requests count by when they were due. The trainer's start, with its
imports and teacher passes, is its own phase; the time between two phases counts for none.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from rich.table import Table

from benchmarks.command import bench_parser, show_table
from benchmarks.machine import machine
from benchmarks.swap import CAPACITY_CONCURRENCY, throughput
from benchmarks.trainer import BusyTrainer, prepare_data
from core.errors import RatchetError
from core.progress import step, track
from core.settings import Settings
from demo.load.traffic import CheckedSample, Report, Traffic, percentile
from serving.app import start
from tests.support.inputs import TEXTS, pictures

REST_SECONDS = 3.0
"""Pause between two phases, so that none answers requests that waited in the other."""
SHARES = (0.5, 0.95, 0.99)
PhaseKind = Literal["without", "starting", "with"]
"""The trainer's state: not running, starting, taking steps."""
KINDS: tuple[PhaseKind, ...] = get_args(PhaseKind)
RESAMPLES = 2_000


@dataclass(frozen=True)
class Phase:
    """Time (seconds since 1970) and kind of a phase, and the steps that the trainer took in it."""

    begin: float
    end: float
    kind: PhaseKind
    steps: int = 0


def run(
    settings: Settings, rounds: int = 4, seconds: float = 45.0, share: float = 0.5, capacity_seconds: float = 8.0
) -> dict[str, Any]:
    """Measure on a new home with the settings' CLIP. Returns the figures.

    Args:
        rounds: phases of each kind.
        seconds: length of a phase.
        share: of capacity.

    Raises RatchetError if the base is not registered, or server or trainer do not start.
    """
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as folder:
        home = Path(folder)
        source = settings.home / "bases" / settings.base.clip
        if not source.is_dir():
            raise RatchetError(f"base {settings.base.clip!r} is not in {settings.home}.", "Run `ratchet base build`.")
        shutil.copytree(source, home / "bases" / settings.base.clip)
        base = settings.base.model_copy(update={"vlm": ""})
        urls = {"ledger_url": None, "artifacts_url": None, "lake_url": None}
        serve = settings.serve.model_copy(update={"cache_bytes": 0})  # the load repeats a few inputs
        ours = prepare_data(settings.model_copy(update={"home": home, "base": base, "serve": serve, **urls}))
        server = start(ours)
        trainer = BusyTrainer(ours, home / "trainer.yaml")
        try:
            return _measure(ours, server.url, trainer, rounds, seconds, share, capacity_seconds)
        finally:
            trainer.stop()
            server.stop()


def _measure(
    settings: Settings, url: str, trainer: BusyTrainer, rounds: int, seconds: float, share: float,
    capacity_seconds: float,
) -> dict[str, Any]:  # fmt: skip
    probes: dict[str, Any] = {"images": pictures(6), "texts": TEXTS, "settings": settings}
    with step("measuring capacity"), Traffic(url, concurrency=CAPACITY_CONCURRENCY, **probes) as closed:
        time.sleep(capacity_seconds)
    rate = max(1.0, throughput(closed.report()) * share)
    phases: list[Phase] = []
    with Traffic(url, rate=rate, **probes) as load:
        for _ in track(range(rounds), "without and with a trainer"):
            time.sleep(REST_SECONDS)
            phases.append(_phase("without", lambda: time.sleep(seconds)))
            phases.append(_phase("starting", trainer.start))
            time.sleep(REST_SECONDS)
            before = trainer.steps()
            phase = _phase("with", lambda: time.sleep(seconds))
            phases.append(replace(phase, steps=trainer.steps() - before))
            trainer.stop()
    return _figures(settings, load.report(), phases, rate)


def _phase(kind: PhaseKind, act: Callable[[], None]) -> Phase:
    began = time.time()
    act()
    return Phase(began, time.time(), kind)


def _figures(settings: Settings, report: Report, phases: Sequence[Phase], rate: float) -> dict[str, Any]:
    took = {kind: [_within(report.samples, phase) for phase in phases if phase.kind == kind] for kind in KINDS}
    figures: dict[str, Any] = {}
    for kind, parts in took.items():
        together = [each for part in parts for each in part]
        figures[f"requests_{kind}"] = len(together)
        figures |= {f"p{share * 100:.0f}_{kind}": round(percentile(together, share), 4) for share in SHARES}
    quiet, busy = took["without"], took["with"]
    low, high = _interval(quiet, busy)
    training = [phase for phase in phases if phase.kind == "with"]
    steps = sum(phase.steps for phase in training)
    at = settings.updater
    return figures | {
        "ratio_p50": round(figures["p50_with"] / figures["p50_without"], 3),
        "ratio_p99": round(figures["p99_with"] / figures["p99_without"], 3),
        "ratio_p99_starting": round(figures["p99_starting"] / figures["p99_without"], 3),
        "ratio_p99_low": round(low, 3),
        "ratio_p99_high": round(high, 3),
        "ratio_p99_by_round": [
            round(percentile(b, 0.99) / percentile(q, 0.99), 3) for q, b in zip(quiet, busy, strict=True)
        ],
        "failed": report.failed,
        "mixed": report.mixed,
        "problems": list(report.problems[:3]),
        "rate_per_second": round(rate, 1),
        "steps_per_second": round(steps / sum(phase.end - phase.begin for phase in training), 3),
        "threads": at.threads,
        "duty_cycle": at.duty_cycle,
        "base": settings.base.clip,
        "machine": machine(),
    }


def _within(samples: Sequence[CheckedSample], phase: Phase) -> list[float]:
    return [each.seconds for each in samples if each.release and phase.begin <= each.due < phase.end]


def _interval(quiet: Sequence[Sequence[float]], busy: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95% interval of the ratio of both p99, resampling requests within each kind (Efron's bootstrap)."""
    random = np.random.default_rng(0)
    tails = []
    for parts in (busy, quiet):
        took = np.concatenate([np.array(part) for part in parts])
        tails.append([np.quantile(random.choice(took, len(took)), 0.99) for _ in range(RESAMPLES)])
    low, high = np.quantile(np.array(tails[0]) / np.array(tails[1]), [0.025, 0.975])
    return float(low), float(high)


def show(figures: dict[str, Any]) -> None:
    table = Table("", *KINDS, title="Requests while a trainer runs, seconds")
    for share in SHARES:
        name = f"p{share * 100:.0f}"
        table.add_row(name, *(str(figures[f"{name}_{kind}"]) for kind in KINDS))
    ratio, low, high = (figures[name] for name in ("ratio_p99", "ratio_p99_low", "ratio_p99_high"))
    table.add_row("p99, over that without", "1", str(figures["ratio_p99_starting"]), f"{ratio} ({low} to {high})")
    table.add_row("trainer's steps a second", "", "", str(figures["steps_per_second"]))
    show_table(table, figures)


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = bench_parser("duty", __doc__)
    parser.add_argument("--rounds", type=int, default=4, help="phases without and with a trainer (4)")
    parser.add_argument("--seconds", type=float, default=45.0, help="length of a phase (45)")
    parser.add_argument("--share", type=float, default=0.5, help="load as a share of capacity (0.5)")
    options = parser.parse_args(arguments)
    show(run(settings, rounds=options.rounds, seconds=options.seconds, share=options.share))
