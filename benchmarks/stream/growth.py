"""The cost of a commit, a worker's memory and its start, at stores of different sizes.

One store grows. At each size the worker starts twice: without its duplicate index, which it rebuilds from the store,
and with it. Then it gets batch after batch, each after the previous one is stored, so that each commit's time can be
read from its own metrics.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.stream.filling import fill, settle
from benchmarks.stream.installation import Installation, produce
from benchmarks.stream.jpegs import canvas, jpegs
from benchmarks.stream.ratchet_process import RatchetProcess
from core.progress import step
from core.settings import Settings
from streams.kafka.broker import EmbeddedBroker

IMAGE_BYTES = 2_000
BATCH_RECORDS = 100
START_SECONDS = 300.0
COUNT, SUM = "ratchet_ingest_commit_seconds_count", "ratchet_ingest_commit_seconds_sum"


@dataclass(frozen=True, slots=True)
class Growth:
    """Measurements at one size."""

    stored: int
    commit_seconds: float
    commit_seconds_worst: float
    memory: int
    """Resident bytes after the work."""
    start_seconds: float
    """From the start of the process to its first commit, without a duplicate index."""
    start_seconds_warm: float
    """The same with the index of the run before."""


def measure(settings: Settings, home: Path, sizes: Sequence[int], commits: int) -> list[Growth]:
    """Measure at these numbers of stored samples, in ascending order. Raises RatchetError when progress stops."""
    results: list[Growth] = []
    with EmbeddedBroker() as broker:
        batches = {"batch_records": BATCH_RECORDS, "batch_seconds": 5.0, "partitions": 1}
        installation = Installation(settings, home, broker.address, batches)
        filled = 0
        for size in sizes:
            with step(f"a store of {size:,} samples"):
                stored = installation.store.tally()["sample"]
                fill(installation.settings.lake, filled + size - stored, filled)
                filled += size - stored
                settle(installation.settings)
                results.append(_measure(installation, size, commits))
    return results


def _measure(installation: Installation, size: int, commits: int) -> Growth:
    images = iter(list(jpegs(canvas(IMAGE_BYTES), (commits + 2) * BATCH_RECORDS, seed=size)))
    shutil.rmtree(installation.settings.home / "ingest", ignore_errors=True)
    cold = installation.worker()
    start_seconds = _start(installation, cold, images)
    cold.stop()
    warm = installation.worker()
    start_seconds_warm = _start(installation, warm, images)
    try:
        times = [_commit(installation, warm, images) for _ in range(commits)]
        memory = warm.memory()
    finally:
        warm.stop()
    return Growth(size, statistics.median(times), max(times), memory, start_seconds, start_seconds_warm)


def _start(installation: Installation, worker: RatchetProcess, images: Iterator[bytes]) -> float:
    """Start a worker that finds a batch in its topic; seconds until that is stored."""
    end = installation.stored() + _send(installation, images)
    began = time.time()
    worker.start()
    worker.wait_for(lambda: installation.stored() >= end, "the first commit", START_SECONDS)
    return installation.stored_at() - began


def _commit(installation: Installation, worker: RatchetProcess, images: Iterator[bytes]) -> float:
    before, version_at = worker.metrics(), installation.stored_at()
    end = installation.stored() + _send(installation, images)
    # The store is read only once it has changed: reading it takes a core away from the commit.
    stored = lambda: installation.stored_at() > version_at and installation.stored() >= end  # noqa: E731
    worker.wait_for(stored, "a commit", START_SECONDS)
    worker.wait_for(lambda: worker.metrics()[COUNT] > before[COUNT], "the metrics of a commit")
    after = worker.metrics()
    return (after[SUM] - before[SUM]) / (after[COUNT] - before[COUNT])


def _send(installation: Installation, images: Iterator[bytes]) -> int:
    kafka = installation.kafka
    batch = [next(images) for _ in range(BATCH_RECORDS)]
    return produce(kafka.bootstrap, kafka.topic, batch, kafka.partitions, first=installation.stored())
