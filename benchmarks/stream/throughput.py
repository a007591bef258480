"""Records a second: real workers and bare consumers on the same records, in turns.

The workers join an empty topic, are stopped (SIGSTOP) while its records are made, and continue; the time runs from
there to the commit of the last record, without start-up, joining and the producer. The bare consumers, one that decodes
each image and one that does not, then read the records that one worker had.
"""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.stream.bare import run_bare
from benchmarks.stream.installation import HELD_SESSION_SECONDS, Installation, produce
from benchmarks.stream.jpegs import canvas, jpegs
from benchmarks.stream.ratchet_process import wait_for
from core.progress import progress_log, step
from core.settings import Settings
from streams.kafka.broker import EmbeddedBroker

MIB = 1 << 20
SECONDS = 300.0
WHO = ("fetch", "bare", "one", "two")


@dataclass
class Throughput:
    """Measurements with images of one size; one value for each round."""

    size: int
    records: int
    fetch: list[dict[str, float]] = field(default_factory=list)
    bare: list[dict[str, float]] = field(default_factory=list)
    """``seconds``, ``cpu_seconds``, ``memory`` (peak bytes; of two workers the sum)."""
    one: list[dict[str, float]] = field(default_factory=list)
    two: list[dict[str, float]] = field(default_factory=list)

    def rate(self, who: str) -> float:
        runs: list[dict[str, float]] = getattr(self, who)
        return self.records / statistics.median(each["seconds"] for each in runs)

    def figures(self) -> dict[str, Any]:
        result: dict[str, Any] = {"image_bytes": self.size, "records": self.records}
        for who in WHO:
            runs = getattr(self, who)
            result[who] = {
                "records_per_second": round(self.rate(who), 1),
                "mb_per_second": round(self.rate(who) * self.size / 1e6, 1),
                "cpu_seconds": round(statistics.median(each["cpu_seconds"] for each in runs), 2),
                "memory_mib": round(max(each["memory"] for each in runs) / MIB),
            }
        ratios = [mine["seconds"] for mine in self.one], [its["seconds"] for its in self.bare]
        result["ratio_to_bare"] = round(self.rate("one") / self.rate("bare"), 3)
        result["ratio_to_fetch"] = round(self.rate("one") / self.rate("fetch"), 3)
        result["ratio_to_bare_two"] = round(self.rate("two") / self.rate("bare"), 3)
        result["ratio_by_round"] = [round(its / mine, 3) for mine, its in zip(*ratios, strict=True)]
        return result


def measure(
    settings: Settings, home: Path, sizes: Sequence[tuple[int, int]], rounds: int, bootstrap: str = ""
) -> list[Throughput]:
    """For each size in bytes this many records, ``rounds`` times. ``bootstrap``: of a running broker; without it each
    round has an embedded one. Raises RatchetError if progress stops.
    """
    results = []
    for size, records in sizes:
        with step(f"{records} images of {size // 1000} KB"):
            images = list(jpegs(canvas(size), records))
        result = Throughput(sum(map(len, images)) // records, records)
        for number in range(rounds):
            with ExitStack() as stack:
                address = bootstrap or stack.enter_context(EmbeddedBroker()).address  # which keeps all records
                folder = home / f"{size}-{number}"
                one = _measure_workers(Installation(settings, folder / "one", address, _held()), 1, images)
                topic = one.pop("topic")
                result.one.append(one)
                result.fetch.append(run_bare(address, topic, records, decode=False))
                result.bare.append(run_bare(address, topic, records, decode=True))
                two = _measure_workers(Installation(settings, folder / "two", address, _held()), 2, images)
                result.two.append(two)
                rates = (records / getattr(result, who)[-1]["seconds"] for who in WHO)
                progress_log.info(
                    "records/s: fetched {:.0f}, decoded {:.0f}, one worker {:.0f}, two {:.0f}".format(*rates)
                )
        results.append(result)
    return results


def _held() -> dict[str, Any]:
    """A stopped worker stays in the group while the records are made; the last batch is stored without a wait."""
    return {"client": {"session_timeout_ms": str(HELD_SESSION_SECONDS * 1000)}, "batch_seconds": 0.2}


def _measure_workers(installation: Installation, count: int, images: Sequence[bytes]) -> dict[str, Any]:
    kafka = installation.kafka
    with installation.workers(count) as workers:
        for worker in workers:
            worker.signal(signal.SIGSTOP)
        produce(kafka.bootstrap, kafka.topic, images, kafka.partitions)
        used = sum(worker.cpu_seconds() for worker in workers)
        began = time.time()
        for worker in workers:
            worker.signal(signal.SIGCONT)
        installation.wait_until_stored(len(images), SECONDS)
        seconds = installation.stored_at() - began
        figures = {
            "topic": kafka.topic,
            "seconds": seconds,
            "cpu_seconds": sum(worker.cpu_seconds() for worker in workers) - used,
            "memory": sum(worker.memory(peak=True) for worker in workers),
        }
        wait_for(lambda: not any(lag for worker in workers for lag in worker.lags().values()), "a lag of 0", 30)
        samples = installation.store.tally()["sample"]
        if samples != len(images):
            progress_log.error(f"{len(images)} records, but {samples} samples")
        return figures
