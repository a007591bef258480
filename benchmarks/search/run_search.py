"""``ratchet bench search``: the catalog at a million vectors of 512 dimensions, compared with faiss used directly.

Both sides hold the same vectors (:mod:`benchmarks.search.mixture`), each in its own process, and are measured in turns
on the same cores. The catalog's rows come through its reconcile loop, from stand-ins of sample store and encoders;
searches go through the whole catalog, and return texts and domains. faiss has an HNSW graph over whole vectors, and the
least effort with which it finds as many of the true ten nearest as the catalog's index does.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.table import Table

from benchmarks.command import bench_parser, show_table
from benchmarks.line_worker import LineWorker
from benchmarks.machine import machine
from benchmarks.search.mixture import DIMENSIONS, Mixture, map_rows, true_scores, write_rows
from benchmarks.search.worker import call
from core.progress import step
from core.settings import Settings
from serving.catalog.index_maintainer import INDEX_ROWS

ROWS: Final = 1_000_000
GROWTH: Final = (100, 10, 1)
"""Also measure at these fractions of the rows."""
QUERIES: Final = 500
ROUNDS: Final = 3
RECALL: Final = 0.95
"""Least recall for tuning faiss, also where the catalog has no index."""


def run(
    rows: int = ROWS, seconds: float = 10.0, folder: Path | None = None, peer: bool = True,
    index_rows: int = INDEX_ROWS,
) -> dict[str, Any]:  # fmt: skip
    """Measure at a hundredth, a tenth and all of the rows. Returns the figures.

    Args:
        seconds: of each of the measurements, of which there are some twenty.
        folder: for some gigabytes; a temporary one by default.
        peer: also measure faiss.
        index_rows: see :data:`serving.catalog.index_maintainer.INDEX_ROWS`.

    Raises RatchetError if a side has ended.
    """
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-", dir=folder) as place:
        sizes = [rows // share for share in GROWTH]
        with step("drawing vectors"):
            _prepare(Path(place), sizes)
        with LineWorker("benchmarks.search.catalog_side", place, str(index_rows)) as catalog:
            if not peer:
                return _figures([_measure(catalog, None, size, seconds) for size in sizes], rows)
            with LineWorker("benchmarks.search.faiss_side", place) as faiss:
                return _figures([_measure(catalog, faiss, size, seconds) for size in sizes], rows)


def _prepare(folder: Path, sizes: Sequence[int]) -> None:
    mixture = Mixture()
    write_rows(mixture, folder / "rows.f32", sizes[-1])
    queries = mixture.queries(QUERIES)
    (folder / "queries.f32").write_bytes(queries.tobytes())
    for size in sizes:
        np.save(folder / f"truth-{size}.npy", true_scores(map_rows(folder / "rows.f32")[:size], queries))


def _measure(catalog: LineWorker, faiss: LineWorker | None, rows: int, seconds: float) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with step(f"{rows:,} rows: the catalog"):
        figures: dict[str, Any] = {"rows": rows, **call(catalog, "grow", rows=rows)}
    sides = {"": catalog}
    if faiss is not None:
        with step(f"{rows:,} rows: faiss"):
            found = call(catalog, "measure", callers=1, seconds=seconds, filtered=False)["recall"]
            recall = max(RECALL, found) if figures["index_used"] else RECALL
            figures["faiss"] = call(faiss, "grow", rows=rows, recall=recall)
        sides["faiss"] = faiss
    for callers in dict.fromkeys((1, cores)):
        with step(f"{rows:,} rows: searches from {callers} at once"):
            rounds = [
                {
                    name: call(side, "measure", callers=callers, seconds=seconds, filtered=False)
                    for name, side in sides.items()
                }
                for _ in range(ROUNDS)
            ]
        for name in sides:
            medians = {
                key: statistics.median(each[name][key] for each in rounds) for key in ("qps", "p50", "p99", "recall")
            }
            (figures["faiss"] if name else figures)[f"callers_{callers}"] = _rounded(medians)
        if faiss is not None:
            ratios = [each[""]["qps"] / each["faiss"]["qps"] for each in rounds]
            figures[f"qps_to_faiss_{callers}"] = round(statistics.median(ratios), 3)
    filtered = call(catalog, "measure", callers=cores, seconds=seconds, filtered=True)
    figures["filtered"] = _rounded({key: filtered[key] for key in ("p50", "p99", "recall")})
    figures["memory_gib"] = filtered["memory_gib"]
    return figures


def _figures(growth: list[dict[str, Any]], rows: int) -> dict[str, Any]:
    largest = growth[-1]
    callers = max((name for name in largest if name.startswith("callers_")), key=lambda name: int(name[8:]))
    at_once = largest[callers]
    return {
        "rows": rows, "dimensions": DIMENSIONS, "recall": at_once["recall"], "qps": at_once["qps"],
        "p50": at_once["p50"], "p99": at_once["p99"],
        "qps_to_faiss": largest.get(f"qps_to_{callers.replace('callers', 'faiss')}"),
        "faiss_recall": largest["faiss"][callers]["recall"] if "faiss" in largest else None,
        "recall_filtered": largest["filtered"]["recall"],
        "ingest_rows_per_second": largest["ingest_rows_per_second"],
        "backfill_rows_per_second": largest["backfill_rows_per_second"],
        "memory_gib": largest["memory_gib"], "growth": growth, "machine": machine(),
    }  # fmt: skip


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 1 if name == "qps" else 5) for name, value in values.items()}


def show(figures: dict[str, Any]) -> None:
    sizes = figures["growth"]
    table = Table(
        "", *(f"{each['rows']:,}" for each in sizes), title=f"Searches among vectors of {DIMENSIONS} dimensions"
    )
    for name in [name for name in sizes[-1] if name != "rows"]:
        table.add_row(name, *(_shown(each.get(name)) for each in sizes))
    show_table(table, figures)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key} {_shown(item)}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = bench_parser("search", __doc__)
    parser.add_argument("--rows", type=int, default=ROWS, help="vectors (1000000); at least 1000")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a measurement (10)")
    parser.add_argument("--folder", type=Path, default=None, help="for some gigabytes; the system's temporary one")
    parser.add_argument("--index-rows", type=int, default=INDEX_ROWS, help="from which on it has an index")
    parser.add_argument("--without-peer", action="store_true", help="measure the catalog alone")
    options = parser.parse_args(arguments)
    if options.rows < 1000:
        parser.error("--rows must be 1000 or more")
    show(run(options.rows, options.seconds, options.folder, not options.without_peer, options.index_rows))
