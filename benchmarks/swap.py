"""``ratchet bench swap``: what a swap costs the requests that are being answered.

Open-loop load at half of the measured capacity, from another process; twenty and more releases of random adapters;
then rollbacks. Every answer is checked against the release it was stamped with. Requests count as *inside* when they
overlap the time from the operator's call to its answer (prepare, commit, acknowledge), as *outside* otherwise.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.inputs import pictures, random_adapter
from benchmarks.load import Report, Traffic, percentile
from benchmarks.machine import machine
from ops.artifacts import Artifacts
from ops.errors import RatchetError
from ops.ledger import Ledger
from ops.progress import step, track
from ops.settings import Settings
from serving.app import start
from serving.client import Client
from serving.engines.base import load_base
from serving.engines.clip import ClipEngine

ADAPTERS = 4
ROLLBACKS = 5
CAPACITY_CONCURRENCY = 8
TEXTS = ("a photo of a cat", "a red circle", "blue square on white", "an old map", "a smiling face", "two birds")


def run(
    settings: Settings, swaps: int = 20, pause_seconds: float = 2.0, capacity_seconds: float = 8.0, share: float = 0.5
) -> dict[str, Any]:
    """Measure on a home of its own with the settings' base. ``share``: of capacity. Returns the figures.

    Raises:
        RatchetError: the base is not registered, or the server does not start.
    """
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as folder:
        home = Path(folder)
        source = settings.home / "bases" / settings.base.clip
        if not source.is_dir():
            raise RatchetError(f"base {settings.base.clip!r} is not in {settings.home}.", "Run `ratchet base build`.")
        shutil.copytree(source, home / "bases" / settings.base.clip)
        # Random adapters are what the guard is there to take back: it would end the measurement.
        unguarded = settings.rollout.model_copy(update={"guard_seconds": 0.0})
        ours = settings.model_copy(
            update={"home": home, "ledger_url": None, "artifacts_url": None, "lake_url": None, "rollout": unguarded}
        )
        names = make_adapters(ours, ADAPTERS)
        server = start(ours)
        try:
            return _measure(ours, server.url, names, swaps, pause_seconds, capacity_seconds, share)
        finally:
            server.stop()


def _measure(
    settings: Settings, url: str, names: Sequence[str], swaps: int, pause: float, capacity_seconds: float, share: float
) -> dict[str, Any]:
    probes: dict[str, Any] = {"images": pictures(6), "texts": TEXTS, "settings": settings}
    with step("measuring capacity"), Traffic(url, concurrency=CAPACITY_CONCURRENCY, **probes) as closed:
        time.sleep(capacity_seconds)
    capacity = throughput(closed.report())
    outcomes: list[dict[str, Any]] = []
    rollbacks: list[float] = []
    windows: list[tuple[float, float]] = []
    client = Client(url, operator_key=settings.operator_key(), actor="bench")
    with client, Traffic(url, rate=max(1.0, capacity * share), **probes) as load:
        time.sleep(pause)
        for count in track(range(swaps), "swaps"):
            began = time.time()
            outcomes.append(client.release(names[count % len(names)], reason=f"bench swap {count + 1}", force=True))
            windows.append((began, time.time()))
            time.sleep(pause)
        for _ in range(ROLLBACKS):
            began = time.time()
            client.rollback(reason="bench rollback")
            windows.append((began, time.time()))
            rollbacks.append(windows[-1][1] - began)
            time.sleep(pause / 2)
    report = load.report()
    inside, outside = split(report, windows)
    p99_in, p99_out = percentile(inside, 0.99), percentile(outside, 0.99)
    return {
        "swaps": len(outcomes),
        "requests": report.requests,
        "failed": report.failed,
        "mixed": report.mixed,
        "capacity_per_second": round(capacity, 1),
        "rate_per_second": round(max(1.0, capacity * share), 1),
        "requests_inside": len(inside),
        "p50_inside": round(percentile(inside, 0.5), 4),
        "p50_outside": round(percentile(outside, 0.5), 4),
        "p99_inside": round(p99_in, 4),
        "p99_outside": round(p99_out, 4),
        "p99_inside_over_outside": round(p99_in / p99_out, 3),
        "prepare_seconds": round(percentile([o["prepare_seconds"] for o in outcomes], 0.5), 4),
        "prepare_seconds_max": round(max(o["prepare_seconds"] for o in outcomes), 4),
        "commit_seconds": round(percentile([o["commit_seconds"] for o in outcomes], 0.5), 4),
        "commit_seconds_max": round(max(o["commit_seconds"] for o in outcomes), 4),
        "rollback_seconds": round(max(rollbacks), 4),
        "base": settings.base.clip,
        "problems": list(report.problems[:3]),
        "machine": machine(),
    }


def split(report: Report, windows: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Latencies of answered requests that overlap a window, and of those that do not; seconds."""
    inside: list[float] = []
    outside: list[float] = []
    for sample in report.samples:
        if sample.release:
            hit = any(sample.due <= end and sample.due + sample.seconds >= begin for begin, end in windows)
            (inside if hit else outside).append(sample.seconds)
    return inside, outside


def throughput(report: Report) -> float:
    answered = [sample for sample in report.samples if sample.release]
    if len(answered) < 2:
        raise RatchetError(f"the server answered {len(answered)} requests: {report.problems}.", "See its log.")
    ends = [sample.due + sample.seconds for sample in answered]
    return (len(ends) - 1) / (max(ends) - min(ends))


def make_adapters(settings: Settings, count: int) -> list[str]:
    """Random LoRA adapters of the settings' base, stored and in the ledger."""
    base = load_base(settings.home, settings.base.clip)
    ledger, artifacts, engine = Ledger.open(settings.ledger), Artifacts(settings.artifacts), ClipEngine(base)
    names = []
    for seed in range(count):
        folder = settings.home / "random" / str(seed)
        name = random_adapter(base, folder, seed)
        spaces = engine.load(name, folder)
        engine.unload(name)
        artifacts.put_directory(folder, f"adapters/{name}")
        ledger.register_adapter(
            name, family="clip", base=base.digest, image_space=spaces.image, text_space=spaces.text,
            meta={"made_by": "ratchet bench"},
        )  # fmt: skip
        names.append(name)
    return names


def show(figures: dict[str, Any]) -> None:
    """A table for people, one JSON line for machines (last)."""
    table = Table(show_header=False, title="Swaps under load")
    for name, value in figures.items():
        shown = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(name, shown)
    Console().print(table)
    print(json.dumps(figures), flush=True)


def main(settings: Settings, arguments: Sequence[str]) -> None:
    """``ratchet bench swap``."""
    parser = argparse.ArgumentParser(prog="ratchet bench swap", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--swaps", type=int, default=20, help="releases under load (20)")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between swaps (2)")
    parser.add_argument("--share", type=float, default=0.5, help="load as a share of capacity (0.5)")
    asked = parser.parse_args(arguments)
    show(run(settings, swaps=asked.swaps, pause_seconds=asked.pause, share=asked.share))
