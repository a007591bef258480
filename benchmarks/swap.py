"""``ratchet bench swap``: the cost of a swap for the requests that are being answered.

Open-loop load at half of the measured capacity, from another process; twenty and more changes of the live release:
releases of random adapters, and every fourth a rollback. If a VLM is served, its adapter is sometimes changed, too.
Every answer is checked against the release in its stamp. Requests count as *inside* when they were sent between the
operator's call and its answer (prepare, commit, acknowledge), or less than the median latency before the call; as
*outside* otherwise. The time of the answer does not count, because the slowest of otherwise equal requests overlap any
such time most often. ``p99_ratio_interval`` is the 95% interval of the ratio, over swaps (bootstrap).

``--swaps 10000 --pause 0`` looks for growth: ``memory_growth`` is the largest ratio, over all processes of the server,
of the memory at the end to that after the first hundred changes.
"""

from __future__ import annotations

import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench_home import bench_home, clip_base
from benchmarks.command import bench_parser, show_figures
from benchmarks.machine import machine
from benchmarks.process_memory import child_processes, memory_growth
from core.artifacts import Artifacts
from core.errors import RatchetError
from core.ledger import Ledger
from core.progress import step, track
from core.settings import Settings
from demo.load.traffic import CheckedSample, Report, Traffic, percentile
from ratchet_client import Client, ServerError
from serving.app import serves_vlm, start
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import load_base
from serving.engines.vlm.vlm_base import load_vlm_base
from tests.support.inputs import TEXTS, pictures, random_adapter

ADAPTERS = 4
ROLLBACK_EVERY = 4
VLM_EVERY = 20
"""A VLM takes seconds to load an adapter on a CPU."""
WARM_SWAPS = 100
"""Memory is compared with that after this many: allocators and caches have their size by then."""
ATTEMPTS = 20
CAPACITY_CONCURRENCY = 8
RESAMPLES = 1000


def run(
    settings: Settings, swaps: int = 20, pause_seconds: float = 2.0, capacity_seconds: float = 8.0, share: float = 0.5,
    base: str = "", **serve: Any,
) -> dict[str, Any]:  # fmt: skip
    """Measure on a new home with the settings' bases. Returns the figures.

    Args:
        share: of capacity.
        base: a CLIP in place of the settings' one: registered, or an architecture that gets random weights.
        serve: fields of ``settings.serve`` to change.

    Raises:
        ConfigError: there is no such base.
        RatchetError: the server does not start.
    """
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as folder:
        changes = {"cache_bytes": 0, **serve}  # the load repeats a few inputs
        ours = bench_home(settings, Path(folder), clip_base(settings, base or settings.base.clip), **changes)
        names = make_adapters(ours, ADAPTERS)
        vlm_names = make_vlm_adapters(ours, 2) if serves_vlm(ours) else []
        server = start(ours)
        try:
            server.wait_ready()
            return _measure(ours, server.url, Swaps(names, vlm_names), swaps, pause_seconds, capacity_seconds, share)
        finally:
            server.stop()


@dataclass
class Swaps:
    """Changes the live release repeatedly, and records the time of each change."""

    names: Sequence[str]
    vlm_names: Sequence[str]
    releases: list[dict[str, Any]] = field(default_factory=list)
    vlm_releases: int = 0
    rollbacks: list[float] = field(default_factory=list)
    """Seconds from the operator's call to its answer."""
    windows: list[tuple[float, float]] = field(default_factory=list)
    """Begin and end of each change; seconds since the epoch."""
    refused: int = 0
    """Rollbacks that the server asked to be retried; the time of the first attempt counts."""

    def change(self, client: Client, number: int) -> None:
        """Make the change with this number, from 1."""
        began = time.time()
        if number % ROLLBACK_EVERY == 0:
            self._roll_back(client, number)
            self.rollbacks.append(time.time() - began)
        elif self.vlm_names and number % VLM_EVERY == 1:
            self.vlm_releases += 1
            name = self.vlm_names[self.vlm_releases % len(self.vlm_names)]
            client.release(vlm=name, reason=f"bench swap {number}", force=True)
        else:
            name = self.names[number % len(self.names)]
            self.releases.append(client.release(name, reason=f"bench swap {number}", force=True))
        self.windows.append((began, time.time()))

    def _roll_back(self, client: Client, number: int) -> None:
        """A busy ledger may not answer in time: such a call is refused, and retried as an operator would."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                client.rollback(reason=f"bench rollback {number}")
                return
            except ServerError as error:
                if error.status != 503 or attempt == ATTEMPTS:
                    raise
                self.refused += 1


def _measure(
    settings: Settings, url: str, made: Swaps, swaps: int, pause: float, capacity_seconds: float, share: float
) -> dict[str, Any]:
    probes: dict[str, Any] = {"images": pictures(6), "texts": TEXTS, "settings": settings}
    with step("measuring capacity"), Traffic(url, concurrency=CAPACITY_CONCURRENCY, **probes) as closed:
        time.sleep(capacity_seconds)
    capacity = throughput(closed.report())
    client = Client(url, settings.operator_key().get_secret_value(), actor="bench", retries=0)
    with client, Traffic(url, rate=max(1.0, capacity * share), **probes) as load:
        time.sleep(pause)
        warm = child_processes()
        for number in track(range(1, swaps + 1), "swaps"):
            made.change(client, number)
            if number == WARM_SWAPS:
                warm = child_processes()
            time.sleep(pause)
        growth = memory_growth(warm, child_processes())
    report = load.report()
    answered = [sample for sample in report.samples if sample.release]
    reach = percentile([sample.seconds for sample in answered], 0.5)
    rounds = by_swap(answered, made.windows, reach)
    inside, outside = ([seconds for each in rounds for seconds in each[part]] for part in (0, 1))
    p99_in, p99_out = percentile(inside, 0.99), percentile(outside, 0.99)
    return {
        "swaps": len(made.windows),
        "vlm_swaps": made.vlm_releases,
        "rollbacks": len(made.rollbacks),
        "rollbacks_refused": made.refused,
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
        "p99_ratio_interval": ratio_interval(rounds),
        "prepare_seconds": round(percentile([o["prepare_seconds"] for o in made.releases], 0.5), 4),
        "prepare_seconds_max": round(max(o["prepare_seconds"] for o in made.releases), 4),
        "commit_seconds": round(percentile([o["commit_seconds"] for o in made.releases], 0.5), 4),
        "commit_seconds_max": round(max(o["commit_seconds"] for o in made.releases), 4),
        "rollback_seconds": round(percentile(made.rollbacks, 0.5), 4),
        "rollback_seconds_max": round(max(made.rollbacks), 4),
        "memory_growth": max(growth.values(), default=None),
        "memory_growth_most": dict(list(growth.items())[:5]),
        "base": settings.base.clip,
        "ingress_replicas": settings.serve.ingress_replicas,
        "encoder_replicas": settings.serve.encoder_replicas,
        "problems": list(report.problems[:3]),
        "machine": machine(),
    }


Round = tuple[list[float], list[float]]
"""Latencies of the requests inside of a swap, and of those between it and the next one; seconds."""


def by_swap(samples: Iterable[CheckedSample], windows: Sequence[tuple[float, float]], reach: float) -> list[Round]:
    """A round for each of the windows, in their order. A request is inside when it was sent in the window, or less than
    ``reach`` seconds before it. Requests before the first one count as after it.
    """
    rounds: list[Round] = [([], []) for _ in windows]
    begins = [begin - reach for begin, _ in windows]
    for sample in samples:
        number = max(bisect_right(begins, sample.due) - 1, 0)
        outside = not begins[number] <= sample.due <= windows[number][1]
        rounds[number][outside].append(sample.seconds)
    return rounds


def ratio_interval(rounds: Sequence[Round]) -> tuple[float, float]:
    """The 95% interval of the p99 inside over that outside; whole rounds are resampled, since requests that are near in
    time are alike.
    """
    random = np.random.default_rng(0)
    parts = [[np.array(each[part]) for each in rounds] for part in (0, 1)]
    ratios = []
    for _ in range(RESAMPLES):
        drawn = random.integers(len(rounds), size=len(rounds))
        inside, outside = (np.quantile(np.concatenate([part[number] for number in drawn]), 0.99) for part in parts)
        ratios.append(inside / outside)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return round(float(low), 3), round(float(high), 3)


def throughput(report: Report) -> float:
    answered = [sample for sample in report.samples if sample.release]
    if len(answered) < 2:
        raise RatchetError(f"the server answered {len(answered)} requests: {report.problems}.", "See its log.")
    ends = [sample.due + sample.seconds for sample in answered]
    return (len(ends) - 1) / (max(ends) - min(ends))


def make_adapters(settings: Settings, count: int) -> list[str]:
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


def make_vlm_adapters(settings: Settings, count: int) -> list[str]:
    base = load_vlm_base(settings.home, settings.base.vlm)
    ledger, artifacts = Ledger.open(settings.ledger), Artifacts(settings.artifacts)
    names = []
    for seed in range(count):
        folder = settings.home / "random-vlm" / str(seed)
        name = random_adapter(base, folder, seed, parts=["text"])
        artifacts.put_directory(folder, f"adapters/{name}")
        ledger.register_adapter(
            name, family="vlm", base=base.digest, image_space="", text_space="", meta={"made_by": "ratchet bench"}
        )
        names.append(name)
    return names


def show(figures: dict[str, Any]) -> None:
    show_figures("Swaps under load", figures)


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = bench_parser("swap", __doc__)
    parser.add_argument("--swaps", type=int, default=20, help="releases and rollbacks under load (20; at least 4)")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between swaps (2); 0: as fast as it goes")
    parser.add_argument("--share", type=float, default=0.5, help="load as a share of capacity (0.5)")
    parser.add_argument("--base", default="", help="a registered CLIP, or an architecture with random weights")
    parser.add_argument("--ingress", type=int, default=0, help="ingress replicas (as in the settings)")
    parser.add_argument("--encoders", type=int, default=0, help="encoder replicas (as in the settings)")
    options = parser.parse_args(arguments)
    if options.swaps < ROLLBACK_EVERY:
        parser.error(f"--swaps must be {ROLLBACK_EVERY} or more: a rollback is one of as many")
    replicas = {"ingress_replicas": options.ingress, "encoder_replicas": options.encoders}
    changed = {name: count for name, count in replicas.items() if count > 0}
    show(run(settings, options.swaps, options.pause, share=options.share, base=options.base, **changed))
