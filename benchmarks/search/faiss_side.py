"""faiss used directly: an HNSW graph over the whole vectors in memory, searched from as many threads as there are
clients.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

import faiss
import numpy as np

from benchmarks.search.mixture import CHUNK_ROWS, NEIGHBOURS, Vectors, map_rows
from benchmarks.search.worker import private_gib, serve

LINKS: Final = 32
CONSTRUCTION: Final = 80
EFFORTS: Final = (16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
SAME: Final = 1e-5


class FaissSide:
    """Tuned to the least effort that reaches the requested recall."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows = map_rows(folder / "rows.f32")
        self._queries = map_rows(folder / "queries.f32")
        self._truth: Vectors = np.empty((0, NEIGHBOURS), np.float32)
        self._index: Any = faiss.IndexHNSWFlat(self._rows.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
        self._index.hnsw.efConstruction = CONSTRUCTION

    def grow(self, rows: int, recall: float) -> dict[str, Any]:
        """Add what is missing, and tune to this recall@10."""
        began, before = time.perf_counter(), self._index.ntotal
        for start in range(before, rows, CHUNK_ROWS):
            self._index.add(np.ascontiguousarray(self._rows[start : min(rows, start + CHUNK_ROWS)]))
        seconds = time.perf_counter() - began
        self._truth = np.load(self._folder / f"truth-{rows}.npy")
        faiss.omp_set_num_threads(1)  # each caller is a thread of its own
        for effort in EFFORTS:
            self._index.hnsw.efSearch = effort
            if self._recall(self._index.search(self._queries, NEIGHBOURS)[0]) >= recall:
                break
        faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
        return {
            "build_seconds": round(seconds, 1), "rows_per_second": round((rows - before) / seconds),
            "ef_search": int(self._index.hnsw.efSearch), "memory_gib": private_gib(),
        }  # fmt: skip

    def measure(self, callers: int, seconds: float, filtered: bool) -> dict[str, Any]:
        """``filtered`` is not measured here."""
        faiss.omp_set_num_threads(1)
        took: list[float] = []
        end = time.perf_counter() + seconds

        def call(first: int) -> None:
            number = first
            while (began := time.perf_counter()) < end:
                self._index.search(self._queries[number % len(self._queries)][None], NEIGHBOURS)
                took.append(time.perf_counter() - began)
                number += callers

        threads = [threading.Thread(target=call, args=(first,)) for first in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        scores = self._index.search(self._queries, NEIGHBOURS)[0]
        return {
            "qps": round(len(took) / seconds, 1), "p50": float(np.quantile(took, 0.5)),
            "p99": float(np.quantile(took, 0.99)), "recall": self._recall(scores),
        }  # fmt: skip

    def _recall(self, scores: Vectors) -> float:
        return float((scores >= self._truth[:, -1:] - SAME).mean())


if __name__ == "__main__":
    serve(FaissSide(Path(sys.argv[1])))
