"""``ratchet bench soak``: does anything grow, fail or mix while a server works for a long time?

Open-loop load at half of the measured capacity, of all kinds: single images and texts, both together, 16 inputs in a
request, classification, search, and chat if a VLM is served. The live release changes every 20 seconds. Every answer is
checked against the release in its stamp. ``memory_growth`` is the largest ratio, over all processes of the server, of
the memory at the end to that after the first five minutes, by their trend.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy import stats

from benchmarks.bench_home import bench_home, clip_base
from benchmarks.command import bench_parser, show_figures
from benchmarks.machine import machine
from benchmarks.process_memory import ProcessMemory, child_processes
from benchmarks.samples import fill_store, wait_until_searchable
from benchmarks.serving.session_processes import session_pids
from benchmarks.swap import CAPACITY_CONCURRENCY, Swaps, make_adapters, make_vlm_adapters, throughput
from core.progress import progress_log, step, track
from core.settings import Settings
from demo.load.traffic import Report, Traffic, percentile
from ratchet_client import Client
from serving.app import serves_vlm, start
from tests.support.inputs import QUESTIONS, TEXTS, pictures

ADAPTERS: Final = 4
IMAGES: Final = 6
BATCH: Final = 16
CAPACITY_SECONDS: Final = 8.0
LEAST_SNAPSHOTS: Final = 3
"""Snapshots after the first minutes that are needed for a trend."""
GROWTH_LIMIT: Final = 1.02
READING_SECONDS: Final = 1.0


@dataclass
class MemoryLog:
    """Memory of each process over time."""

    seconds: list[float] = field(default_factory=list)
    snapshots: list[Mapping[int, ProcessMemory]] = field(default_factory=list)

    def add(self, seconds: float, processes: Mapping[int, ProcessMemory]) -> None:
        self.seconds.append(seconds)
        self.snapshots.append(processes)

    def growth(self, warm_seconds: float) -> dict[str, float]:
        """Memory at the end over that after ``warm_seconds``, by name and ID, the largest first; of processes that are
        in all snapshots from then on, and not small in the first of them. Both are on the line whose slope is the
        median of those between any two snapshots (Theil and Sen), because a single one may include a request's images,
        or an adapter more.
        """
        first = next((n for n, seconds in enumerate(self.seconds) if seconds >= warm_seconds), len(self.seconds))
        seconds, snapshots = np.array(self.seconds[first:]), self.snapshots[first:]
        if len(snapshots) < LEAST_SNAPSHOTS:
            return {}
        ratios = {}
        for pid, memory in snapshots[0].items():
            if not memory.is_small and all(pid in each for each in snapshots):
                slope, start, *_ = stats.theilslopes([each[pid].size for each in snapshots], seconds)
                at_first, at_last = start + slope * seconds[0], start + slope * seconds[-1]
                ratios[f"{memory.name} {pid}"] = round(float(at_last / at_first), 4)
        return dict(sorted(ratios.items(), key=lambda item: -item[1]))

    def ended(self, warm_seconds: float) -> list[str]:
        """Processes that existed and were not small after ``warm_seconds``, and are gone at the end."""
        last = self.snapshots[-1] if self.snapshots else {}
        names = {
            f"{memory.name} {pid}"
            for seconds, each in zip(self.seconds, self.snapshots, strict=True)
            if seconds >= warm_seconds
            for pid, memory in each.items()
            if pid not in last and not memory.is_small
        }
        return sorted(names)


def run(
    settings: Settings, minutes: float = 20.0, every: float = 20.0, warm_minutes: float = 5.0, share: float = 0.5,
    base: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Run a server on a new home. Returns the figures.

    Args:
        every: seconds between changes of the live release.
        share: of the measured capacity.
        base: a CLIP in place of the settings' one: registered, or an architecture that gets random weights.

    Raises:
        ConfigError: there is no such base.
        RatchetError: the server does not start.
    """
    with tempfile.TemporaryDirectory(prefix="ratchet-soak-", ignore_cleanup_errors=True) as folder:
        clip = clip_base(settings, base or settings.base.clip)
        ours = bench_home(settings, Path(folder), clip, cache_bytes=0)  # the load repeats a few inputs
        images = pictures(IMAGES)
        sample_ids = fill_store(ours, images)
        swaps = Swaps(make_adapters(ours, ADAPTERS), make_vlm_adapters(ours, 2) if serves_vlm(ours) else [])
        server = start(ours)
        try:
            server.wait_ready()
            with Client(server.url, ours.operator_key().get_secret_value()) as client:
                wait_until_searchable(client, len(sample_ids))
            return measure(ours, server.url, swaps, images, sample_ids, 60 * minutes, every, 60 * warm_minutes, share)
        finally:
            server.stop()


def measure(
    settings: Settings, url: str, swaps: Swaps, images: Sequence[bytes], sample_ids: Sequence[str], seconds: float,
    every: float, warm_seconds: float, share: float, capacity_seconds: float = CAPACITY_SECONDS,
) -> dict[str, Any]:  # fmt: skip
    """Load the running server of ``settings`` and change its live release. Returns the figures. ``sample_ids``: of the
    images, which are all that its catalog has.
    """
    questions = [(images[0], text) for text in QUESTIONS] if swaps.vlm_names else []
    probes: dict[str, Any] = {
        "images": images, "texts": TEXTS, "settings": settings, "questions": questions, "sample_ids": sample_ids,
        "batch": BATCH,
    }  # fmt: skip
    with step("measuring capacity"), Traffic(url, concurrency=CAPACITY_CONCURRENCY, **probes) as closed:
        time.sleep(capacity_seconds)
    capacity = closed.report()
    rate = max(1.0, throughput(capacity) * share)
    memory, began = MemoryLog(), time.monotonic()
    client = Client(url, settings.operator_key().get_secret_value(), actor="bench", retries=0)
    with client, Traffic(url, rate=rate, **probes) as load:
        for number in track(range(1, max(1, round(seconds / every)) + 1), "swaps"):
            swaps.change(client, number)
            # Long after the change: what it replaced is not resident any more.
            time.sleep(max(0.0, (number - 0.5) * every - (time.monotonic() - began)))
            lowest = lowest_memory(settings, began + number * every)
            memory.add(time.monotonic() - began, lowest)
    with step("comparing every answer"):
        return _figures(settings, load.report(), capacity, swaps, memory, warm_seconds, rate)


def lowest_memory(settings: Settings, until: float) -> dict[int, ProcessMemory]:
    """The lowest of several readings, until the monotonic second, of each process of a home's session that still exists
    then: a batch in hand takes up to a tenth of an encoder.
    """
    lowest: dict[int, ProcessMemory] = {}
    while True:
        ours = set(session_pids(settings))
        now = {pid: each for pid, each in child_processes(1).items() if pid in ours}
        lowest = {pid: min(each, lowest.get(pid, each), key=lambda memory: memory.size) for pid, each in now.items()}
        if (left := until - time.monotonic()) <= 0:
            return lowest
        time.sleep(min(READING_SECONDS, left))


def _figures(
    settings: Settings, report: Report, capacity: Report, swaps: Swaps, memory: MemoryLog, warm_seconds: float,
    rate: float,
) -> dict[str, Any]:  # fmt: skip
    growth = memory.growth(warm_seconds)
    kinds = [sample.kind for sample in report.samples]
    last = memory.snapshots[-1] if memory.snapshots else {}
    return {
        "memory_growth": max(growth.values(), default=None),
        "memory_growth_most": dict(list(growth.items())[:5]),
        "memory_gib": round(sum(each.size for each in last.values()) / 2**30, 3),
        "processes": len(growth),
        "processes_ended": memory.ended(warm_seconds),
        "failed": report.failed + capacity.failed,
        "mixed": report.mixed + capacity.mixed,
        "requests": report.requests,
        "requests_by_kind": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "swaps": len(swaps.windows),
        "vlm_swaps": swaps.vlm_releases,
        "rollbacks": len(swaps.rollbacks),
        "rate_per_second": round(rate, 1),
        "p99": round(percentile([sample.seconds for sample in report.samples if sample.release], 0.99), 4),
        "warm_seconds": warm_seconds,
        "base": settings.base.clip,
        "problems": [*report.problems, *capacity.problems][:3],
        "machine": machine(),
    }


def violations(figures: Mapping[str, Any]) -> list[str]:
    wrong = [f"{name} {figures[name]}" for name in ("failed", "mixed", "processes_ended") if figures[name]]
    growth = figures["memory_growth"]
    return wrong + ([f"memory_growth {growth}"] if growth is None or growth >= GROWTH_LIMIT else [])


def show(figures: dict[str, Any]) -> None:
    show_figures("A server at work", figures)


def main(settings: Settings, arguments: Sequence[str]) -> None:
    """Ends with status 1 when something grew, failed, mixed or ended."""
    parser = bench_parser("soak", __doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="length of the run (20)")
    parser.add_argument("--every", type=float, default=20.0, help="seconds between changes of what is live (20)")
    parser.add_argument("--warm", type=float, default=5.0, help="minutes after which memory is compared with (5)")
    parser.add_argument("--share", type=float, default=0.5, help="load as a share of capacity (0.5)")
    parser.add_argument("--base", default="", help="a registered CLIP, or an architecture with random weights")
    options = parser.parse_args(arguments)
    if options.minutes <= options.warm:
        parser.error("--minutes must be more than --warm")
    figures = run(settings, options.minutes, options.every, options.warm, options.share, options.base)
    show(figures)
    if wrong := violations(figures):
        progress_log.error(f"{', '.join(wrong)}")
        raise SystemExit(1)
