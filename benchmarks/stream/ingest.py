"""``ratchet bench ingest``: how fast the stream is stored, and whether that changes as the store grows.

1. Records a second of one and of two ``ratchet ingest`` processes, compared with a bare kafka-python consumer that
   decodes the images and one that only fetches them, for images of three sizes (:mod:`benchmarks.stream.throughput`).
2. Time of a commit, memory and time of a start, at stores of three sizes (:mod:`benchmarks.stream.growth`).
3. Bytes that maintenance writes for each byte ingested (:mod:`benchmarks.stream.amplification`).

All run against the embedded broker, which takes its share of the same cores; with ``--kafka`` only the first, against
that broker.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.command import bench_parser
from benchmarks.machine import machine
from benchmarks.stream import amplification, growth, throughput
from benchmarks.stream.amplification import Amplification
from benchmarks.stream.growth import Growth
from benchmarks.stream.throughput import MIB, Throughput
from core.progress import step
from core.settings import Settings


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the measurements."""

    images: tuple[tuple[int, int], ...]
    """Bytes of an image, and how many."""
    rounds: int
    stores: tuple[int, ...]
    commits: int
    writes: tuple[tuple[int, int, int, int], ...]
    """Rows, rows of a commit, commits between two runs of maintenance, bytes of an image."""


FULL = Sizes(
    images=((20_000, 4_000), (100_000, 1_000), (1_000_000, 120)),
    rounds=2,
    stores=(10_000, 100_000, 1_000_000),
    commits=30,
    # a busy stream, and one with a few records per commit
    writes=((150_000, 512, 8, 3_000), (12_000, 16, 15, 3_000)),
)
FAST = Sizes(
    images=((20_000, 300), (100_000, 100)),
    rounds=1,
    stores=(1_000, 5_000),
    commits=5,
    writes=((10_000, 256, 8, 2_000),),
)


def run(settings: Settings, sizes: Sizes = FULL, bootstrap: str = "") -> dict[str, Any]:
    """Measure in new homes. Returns the figures. ``bootstrap``: of a running broker. Only the throughput is measured,
    against it. Raises RatchetError if progress stops.
    """
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as temporary:
        home = Path(temporary)
        rates = throughput.measure(settings, home / "rates", sizes.images, sizes.rounds, bootstrap)
        if bootstrap:
            return throughput_of(rates) | {"kafka": bootstrap, "machine": machine()}
        growths = growth.measure(settings, home / "growth", sizes.stores, sizes.commits)
        writes = []
        for number, (rows, commit_rows, commits, size) in enumerate(sizes.writes):
            with step(f"maintenance during commits of {commit_rows} rows"):
                writes.append(amplification.measure(home / f"writes-{number}", rows, commit_rows, commits, size))
    return figures_of(rates, growths, writes) | {"machine": machine()}


def figures_of(
    rates: Sequence[Throughput], growths: Sequence[Growth], writes: Sequence[Amplification]
) -> dict[str, Any]:
    """The figures of a run; the required ones first."""
    small, large = growths[0], growths[-1]
    return {
        **throughput_of(rates),
        "commit_growth": round(large.commit_seconds / small.commit_seconds, 3),
        "memory_growth": round(large.memory / small.memory, 3),
        "write_amplification": round(max(each.ratio for each in writes), 3),
        "start_seconds_at_1m": round(large.start_seconds, 2),
        "start_seconds_at_1m_warm": round(large.start_seconds_warm, 2),
        "stored": large.stored,
        "growth": [
            {
                "stored": each.stored,
                "commit_seconds": round(each.commit_seconds, 4),
                "commit_seconds_worst": round(each.commit_seconds_worst, 4),
                "memory_mib": round(each.memory / MIB),
                "start_seconds": round(each.start_seconds, 2),
                "start_seconds_warm": round(each.start_seconds_warm, 2),
            }
            for each in growths
        ],
        "writes": [
            {
                "rows": each.rows,
                "commit_rows": each.commit_rows,
                "commits_a_run": each.commits_a_run,
                "ingested_mib": round(each.ingested / MIB, 1),
                "maintenance_mib": round((each.data + each.indexes) / MIB, 1),
                "index_mib": round(each.indexes / MIB, 1),
                "ratio": round(each.ratio, 3),
                "fragments": each.fragments,
            }
            for each in writes
        ],
    }


def throughput_of(rates: Sequence[Throughput]) -> dict[str, Any]:
    sizes = [each.figures() for each in rates]
    ratios = ("ratio_to_bare", "ratio_to_fetch", "ratio_to_bare_two")
    return {name: min(each[name] for each in sizes) for name in ratios} | {"throughput": sizes}


def show(figures: dict[str, Any]) -> None:
    console = Console()
    console.print(_throughput_table(figures["throughput"]))
    for part, title in (("growth", "As the store grows"), ("writes", "What maintenance writes")):
        if part in figures:
            console.print(_table(title, figures[part]))
    summary = Table(show_header=False, title="Ingest")
    for name, value in figures.items():
        if not isinstance(value, (list, dict)):
            summary.add_row(name, str(value))
    console.print(summary)
    print(json.dumps(figures), flush=True)


def _throughput_table(sizes: Sequence[dict[str, Any]]) -> Table:
    table = Table("image", "reader", "records/s", "MB/s", "CPU s", "memory MiB", "to decoding", title="Throughput")
    readers = {"fetch": "fetching alone", "bare": "decoding", "one": "one worker", "two": "two workers"}
    for size in sizes:
        for who, reader in readers.items():
            its = size[who]
            image = f"{size['image_bytes'] / 1000:.0f} KB" if who == "fetch" else ""
            ratio = round(its["records_per_second"] / size["bare"]["records_per_second"], 3)
            values = (its["records_per_second"], its["mb_per_second"], its["cpu_seconds"], its["memory_mib"], ratio)
            table.add_row(image, reader, *map(str, values))
    return table


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(*(name.replace("_", " ") for name in rows[0]), title=title)
    for row in rows:
        table.add_row(*map(str, row.values()))
    return table


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = bench_parser("ingest", __doc__)
    parser.add_argument("--fast", action="store_true", help="little of everything, in a minute")
    parser.add_argument("--rounds", type=int, default=None, help="of the throughput; the median counts (2)")
    parser.add_argument("--kafka", default="", metavar="HOST:PORT", help="the throughput alone, against this broker")
    options = parser.parse_args(arguments)
    sizes = FAST if options.fast else FULL
    if options.rounds is not None:
        sizes = replace(sizes, rounds=options.rounds)
    show(run(settings, sizes, options.kafka))
