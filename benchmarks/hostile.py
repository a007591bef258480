"""``ratchet bench hostile``: what a good client notices of hostile ones.

An open-loop load of embeddings, whose every answer is checked, comes from 127.0.0.1; attackers come from 127.0.0.2.
The load is alone and beside one attack in turns, so that a slower minute of the machine slows both.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import hostile_attacks as attacks
from benchmarks.bench_home import bench_home
from benchmarks.hostile_attacks import Target
from benchmarks.machine import machine
from benchmarks.server_memory import ServerMemory
from ops.load.traffic import Report, Traffic, percentile
from ops.progress import step
from ops.settings import Settings
from ops.testing.inputs import TEXTS, pictures
from serving.app import serves_vlm, start
from serving.engines.clip_base import load_base

ATTACKER = "127.0.0.2"
SAMPLING_SECONDS = 1800.0
"""Longest time for the fuzzed sampling parameters, which end by themselves."""
Attack = Callable[[Target], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class Turn:
    """One attack: when it went on, and what came back."""

    name: str
    began: float
    ended: float
    counts: dict[str, int]


def plan(vlm: bool, scale: float = 1.0) -> dict[str, Attack]:
    """The attacks by name. ``scale``: of the number of connections and requests."""

    def sized(attack: Callable[..., Coroutine[Any, Any, None]], count: int, **options: Any) -> Attack:
        return partial(attack, **{"connections": max(1, round(count * scale)), **options})

    chosen = {
        "without_a_body": sized(attacks.without_a_body, 300),
        "silent": sized(attacks.silent, 4200),
        "one_byte_a_second": sized(attacks.one_byte_a_second, 64),
        "picture_bombs": sized(attacks.picture_bombs, 32),
        "health_flood": sized(attacks.health_flood, 20),
        "cancelled_requests": sized(attacks.cancelled_requests, 10, vlm=vlm),
    }
    if vlm:
        chosen["fuzzed_sampling"] = partial(attacks.fuzzed_sampling, requests=max(1, round(10_000 * scale)))
    return chosen


def run(settings: Settings, seconds: float = 20.0, rate: float = 8.0, scale: float = 1.0) -> dict[str, Any]:
    """Measure on a home of its own with the settings' bases. Returns the figures.

    Raises:
        RatchetError: the base is not registered, or the server does not start.
    """
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as folder:
        ours = bench_home(settings, Path(folder), load_base(settings.home, settings.base.clip))
        server = start(ours)
        try:
            server.wait_ready()
            return measure(ours, plan(serves_vlm(ours), scale), seconds, rate)
        finally:
            server.stop()


def measure(settings: Settings, chosen: dict[str, Attack], seconds: float, rate: float) -> dict[str, Any]:
    """Attack a server that runs. ``seconds``: of each turn with and without; ``rate``: good requests a second."""
    _allow_sockets()
    server, turns = settings.serve, []
    attacks.bomb(server.max_pixels)  # drawn before anything is measured: it takes seconds
    images = pictures(6)
    with (
        ServerMemory(settings) as memory,
        Traffic(server.url, images=images, texts=TEXTS, settings=settings, rate=rate) as good,
    ):
        good.wait_for(2 * len(images))
        began = time.time()
        for name, attack in chosen.items():
            time.sleep(seconds)
            target = Target(server.host, server.port, ATTACKER, max_pixels=server.max_pixels)
            with step(name.replace("_", " ")):
                turns.append(_turn(name, attack, target, seconds))
        time.sleep(seconds)
    return figures(good.report(), turns, began, memory.most_bytes)


def _turn(name: str, attack: Attack, target: Target, seconds: float) -> Turn:
    limit = SAMPLING_SECONDS if name == "fuzzed_sampling" else seconds
    began = time.time()

    async def go() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(attack(target), limit)

    asyncio.run(go())
    return Turn(name, began, time.time(), dict(target.counts))


def figures(report: Report, turns: Sequence[Turn], began: float, memory_bytes: int) -> dict[str, Any]:
    """What is printed. ``began``: earlier requests warm the server up."""
    seconds: dict[str, list[float]] = {name: [] for name in ("quiet", *(turn.name for turn in turns))}
    failed: Counter[str] = Counter()
    for sample in report.samples:
        if sample.due < began:
            continue
        beside = next(
            (t.name for t in turns if sample.due <= t.ended and sample.due + sample.seconds >= t.began), "quiet"
        )
        if sample.problem:
            failed[beside] += 1
        seconds[beside].append(sample.seconds)
    attacked = [value for name, values in seconds.items() if name != "quiet" for value in values]
    quiet = percentile(seconds["quiet"], 0.99)
    return {
        "good_requests": sum(map(len, seconds.values())),
        "good_failed": failed.total(),
        "p99_quiet": round(quiet, 4),
        "p99_attacked": round(percentile(attacked, 0.99), 4),
        "p99_ratio": round(percentile(attacked, 0.99) / quiet, 3),
        "rss_max_gib": round(memory_bytes / 2**30, 3),
        "attacks": {
            turn.name: {
                "p99_ratio": round(percentile(seconds[turn.name], 0.99) / quiet, 3),
                "good_failed": failed[turn.name],
                "answers": dict(sorted(turn.counts.items())),
            }
            for turn in turns
        },
        "problems": list(report.problems[:3]),
        "machine": machine(),
    }


def show(result: dict[str, Any]) -> None:
    """A table for people, one JSON line for machines (last)."""
    table = Table(
        "attack", "p99, as a multiple", "good requests failed", "what the attacker got", title="Hostile clients"
    )
    for name, row in result["attacks"].items():
        answers = ", ".join(f"{count} x {kind}" for kind, count in row["answers"].items())
        table.add_row(name.replace("_", " "), f"{row['p99_ratio']:.2f}", str(row["good_failed"]), answers)
    Console().print(table)
    print(json.dumps(result), flush=True)


def _allow_sockets() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 16_384 if hard == resource.RLIM_INFINITY else min(hard, 16_384)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def main(settings: Settings, arguments: Sequence[str]) -> None:
    """``ratchet bench hostile``."""
    parser = argparse.ArgumentParser(
        prog="ratchet bench hostile", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of each turn with and without an attack (20)")
    parser.add_argument("--rate", type=float, default=8.0, help="requests of the good client a second (8)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of attackers (1)")
    chosen = parser.parse_args(arguments)
    show(run(settings, chosen.seconds, chosen.rate, chosen.scale))
