"""``ratchet bench hostile``: the effect of hostile clients on a good one.

An open-loop load of embeddings, with every answer checked, comes from 127.0.0.1; attackers come from 127.0.0.2, and
from a process of low priority: they stand for other machines, whose computation must not look like the server's. The
load runs alone and with one attack, in turns, so that a slower minute of the machine slows both. An operator rolls back
every few seconds. Vectors are not cached: the load repeats a few inputs, and would bypass the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import multiprocessing
import resource
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import hostile_attacks as attacks
from benchmarks.bench_home import bench_home
from benchmarks.command import bench_parser, show_table
from benchmarks.hostile_attacks import Target
from benchmarks.machine import machine
from benchmarks.server_memory import ServerMemory
from benchmarks.swap import make_adapters
from core.priority import nice_process
from core.progress import step
from core.settings import Settings
from demo.load.traffic import Report, Traffic, percentile
from ratchet_client import Client
from ratchet_client.errors import RatchetError
from serving.app import serves_vlm, start
from serving.engines.clip_base import load_base
from tests.support.inputs import TEXTS, pictures

ATTACKER = "127.0.0.2"
ATTACKER_NICE = 10
ROLLBACK_PAUSE_SECONDS = 2.0
SAMPLING_SECONDS = 1800.0
"""Longest time for the fuzzed sampling parameters, which end by themselves."""
Attack = Callable[[Target], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class Turn:
    """One attack: its time, and the results."""

    name: str
    began: float
    ended: float
    counts: dict[str, int]
    memory_bytes: int = 0


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
        "wrong_labels": sized(attacks.wrong_labels, 4),
        "unknown_keys": sized(attacks.unknown_keys, 4),
        "release_polls": sized(attacks.release_polls, 20),
        "many_small_images": sized(attacks.many_small_images, 192),
        "stalled_bodies": sized(attacks.stalled_bodies, 64),
    }
    if vlm:
        chosen["metadata"] = sized(attacks.metadata, 4)
        chosen["abandoned_chats"] = sized(attacks.abandoned_chats, 20)
        chosen["large_pictures"] = sized(attacks.large_pictures, 32)
        chosen["fuzzed_sampling"] = partial(attacks.fuzzed_sampling, requests=max(1, round(10_000 * scale)))
    return chosen


def run(settings: Settings, seconds: float = 20.0, rate: float = 8.0, scale: float = 1.0) -> dict[str, Any]:
    """Measure on a new home with the settings' bases. Returns the figures. Raises RatchetError if the base is not
    registered, or the server does not start.
    """
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as folder:
        ours = bench_home(settings, Path(folder), load_base(settings.home, settings.base.clip), cache_bytes=0)
        (adapter,) = make_adapters(ours, 1)
        server = start(ours)
        try:
            server.wait_ready()
            with Rollbacks(ours, adapter) as rollbacks:
                return measure(ours, plan(serves_vlm(ours), scale), seconds, rate, rollbacks)
        finally:
            server.stop()


class Rollbacks:
    """An operator who switches between the base and an adapter, for as long as the block lasts."""

    def __init__(self, settings: Settings, adapter: str) -> None:
        self.seconds: list[tuple[float, float]] = []
        """When each was ordered (seconds since the epoch), and how long it took."""
        self.problems: list[str] = []
        self._client = Client(
            settings.serve.url, settings.operator_key().get_secret_value(), actor="bench", retries=0
        )  # fmt: skip
        self._adapter = adapter
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Rollbacks:
        self._client.release(self._adapter, reason="bench hostile", force=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._client.close()

    def _run(self) -> None:
        while not self._done.wait(ROLLBACK_PAUSE_SECONDS):
            began = time.time()
            try:
                self._client.rollback(reason="bench hostile")
            except RatchetError as error:
                self.problems.append(f"rollback: {error}")
            self.seconds.append((began, time.time() - began))


def measure(
    settings: Settings, chosen: dict[str, Attack], seconds: float, rate: float, rollbacks: Rollbacks | None = None
) -> dict[str, Any]:
    """Attack a running server. ``seconds``: of each turn with and without; ``rate``: good requests a second."""
    server, turns = settings.serve, []
    images = pictures(6)
    with (
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare) as attackers,
        ServerMemory(settings) as memory,
        Traffic(server.url, images=images, texts=TEXTS, settings=settings, rate=rate) as good,
    ):
        attackers.submit(attacks.bomb, server.max_pixels).result()  # before anything is measured: it takes seconds
        good.wait_for(2 * len(images))
        began = time.time()
        for name, attack in chosen.items():
            time.sleep(seconds)
            target = Target(server.host, server.port, ATTACKER, max_pixels=server.max_pixels)
            with step(name.replace("_", " ")):
                turns.append(_turn(attackers, name, attack, target, seconds))
        time.sleep(seconds)
    turns = [replace(turn, memory_bytes=memory.most_bytes(turn.began, turn.ended)) for turn in turns]
    result = figures(good.report(), turns, began, memory.most_bytes(ended=turns[0].began), memory.most_bytes())
    if rollbacks is not None:
        result |= rollback_figures(rollbacks.seconds, rollbacks.problems, turns)
    return result | {"machine": machine()}


def _turn(attackers: Executor, name: str, attack: Attack, target: Target, seconds: float) -> Turn:
    limit = SAMPLING_SECONDS if name == "fuzzed_sampling" else seconds
    began = time.time()
    counts = attackers.submit(_attack, attack, target, limit).result()
    return Turn(name, began, time.time(), counts)


def _attack(attack: Attack, target: Target, seconds: float) -> dict[str, int]:
    async def go() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await attack(target)

    asyncio.run(go())
    return dict(target.counts)


def figures(report: Report, turns: Sequence[Turn], began: float, quiet_bytes: int, memory_bytes: int) -> dict[str, Any]:
    """The printed figures. ``began``: earlier requests warm the server up. ``quiet_bytes``: before the first attack."""
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
    stalls = stalls_of(report, began)
    return {
        "good_requests": sum(map(len, seconds.values())),
        "good_failed": failed.total(),
        "p99_quiet": round(quiet, 4),
        "p99_attacked": round(percentile(attacked, 0.99), 4),
        "p99_ratio": round(percentile(attacked, 0.99) / quiet, 3),
        "stall_seconds_max": round(max((stall for _, stall in stalls), default=0.0), 3),
        "rss_quiet_gib": round(quiet_bytes / 2**30, 3),
        "rss_max_gib": round(memory_bytes / 2**30, 3),
        "rss_ratio": round(memory_bytes / quiet_bytes, 3) if quiet_bytes else None,
        "attacks": {
            turn.name: {
                "p99_ratio": round(percentile(seconds[turn.name], 0.99) / quiet, 3),
                "good_failed": failed[turn.name],
                "stall_seconds_max": round(
                    max((s for at, s in stalls if turn.began <= at <= turn.ended), default=0), 3
                ),
                "rss_max_gib": round(turn.memory_bytes / 2**30, 3),
                "answers": dict(sorted(turn.counts.items())),
            }
            for turn in turns
        },
        "problems": list(report.problems[:3]),
    }


def stalls_of(report: Report, began: float) -> list[tuple[float, float]]:
    """When each good answer came (seconds since the epoch), and how long after the one before."""
    ends = sorted(sample.due + sample.seconds for sample in report.samples if sample.due >= began and sample.release)
    return [(end, end - before) for before, end in pairwise(ends)]


def rollback_figures(
    rollbacks: Sequence[tuple[float, float]], problems: Sequence[str], turns: Sequence[Turn]
) -> dict[str, Any]:
    by_attack = {
        turn.name: max((took for at, took in rollbacks if at <= turn.ended and at + took >= turn.began), default=None)
        for turn in turns
    }
    return {
        "rollbacks": len(rollbacks),
        "rollbacks_failed": len(problems),
        "rollback_seconds_max": round(max((took for _, took in rollbacks), default=math.nan), 3),
        "rollback_seconds": {name: None if took is None else round(took, 3) for name, took in by_attack.items()},
        "rollback_problems": list(problems[:3]),
    }


def show(result: dict[str, Any]) -> None:
    table = Table(
        "attack", "p99, as a multiple", "longest stall (s)", "good requests failed", "what the attacker got",
        title="Hostile clients",
    )  # fmt: skip
    for name, row in result["attacks"].items():
        answers = ", ".join(f"{count} x {kind}" for kind, count in row["answers"].items())
        numbers = (f"{row['p99_ratio']:.2f}", f"{row['stall_seconds_max']:.2f}", str(row["good_failed"]))
        table.add_row(name.replace("_", " "), *numbers, answers)
    show_table(table, result)


def _prepare() -> None:
    nice_process(ATTACKER_NICE)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 16_384 if hard == resource.RLIM_INFINITY else min(hard, 16_384)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = bench_parser("hostile", __doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each turn with and without an attack (20)")
    parser.add_argument("--rate", type=float, default=8.0, help="requests of the good client a second (8)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of attackers (1)")
    chosen = parser.parse_args(arguments)
    show(run(settings, chosen.seconds, chosen.rate, chosen.scale))
