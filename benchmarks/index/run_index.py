"""``ratchet bench index``: indexes outside follow a release and a rollback while their worker is killed.

A table in a real PostgreSQL with pgvector, kept by a real ``ratchet index run``, and then a collection in Qdrant's
local mode, whose worker shares a process with its clients. The worker gets SIGKILL in each state of the new space. A
client searches all the time as the guide says, and embeds the query itself in place of ``/v1/embeddings``; another
changes and adds rows. Releases are written to the ledger when the index is ready, as the controller does. The adapter
has random weights, so its space differs wholly. Of each answer the nearest row is embedded again: a query is mixed if
that gives another vector. ``recall`` is recall@10 of clients against exact search in a whole re-embedding; a row is
lost if clients do not find the vector of its last image. ``rows_to_encoder`` is the rate of a fill over the encoder's
own, before and after it. Qdrant's local mode is Python, slow beyond a few thousand points: its figures are of safety,
not of speed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.table import Table as Shown

from benchmarks.bench_home import bench_home, clip_base
from benchmarks.command import bench_parser, show_table
from benchmarks.index.pgvector_table import PgvectorTable
from benchmarks.index.qdrant_table import QdrantTable
from benchmarks.index.table import NEIGHBOURS, SAME, Encoder, Table, picture
from benchmarks.machine import machine
from benchmarks.swap import make_adapters
from core.errors import RatchetError
from core.ledger import Ledger
from core.progress import progress_log, step
from core.settings import Settings
from serving.indexes.worker import PAGE_ROWS
from tests.support.postgres import postgres_server, with_pgvector

QUERIES: Final = 50
KILLED_IN: Final = ("planned", "filling", "verified", "ready", "live")
ENCODER_SECONDS: Final = 5.0
FILL_PAUSE: Final = 0.2
"""Between looks at the ledger while a fill is measured, on the same cores."""
LIMIT_SECONDS: Final = 7200.0


def wait(condition: Callable[[], object], pause: float = 0.005) -> None:
    until = time.monotonic() + LIMIT_SECONDS
    while not condition():
        if time.monotonic() > until:
            raise RatchetError("the index did not follow in time.", "Look at the worker's output.")
        time.sleep(pause)


class IndexRun:
    def __init__(self, ledger: Ledger, encode: Encoder, table: Table) -> None:
        self.ledger, self.encode, self.table = ledger, encode, table
        self.number = 0

    def measure(self, rows: int) -> dict[str, Any]:
        base, new = self.encode.clips
        with step("making rows"):
            self.table.fill(rows)
        self.ledger.add_index(self.table.index, actor="bench")
        self.release(None)
        before = self.encoder_rate()
        self.table.start_worker()
        rate = self.fill_rate(base, rows)
        wait(lambda: self.state(base)[0] == "live")
        encoder = (before + self.encoder_rate()) / 2
        self.table.start_clients()
        killed = self.upgrade(new)
        progress_log.info(f"killed in {', '.join(killed)}; now back")
        counted_at = self.counted_at()
        wait(lambda: self.counted_at() > counted_at)  # the last of the workers is up
        began = time.monotonic()
        self.release(None)
        wait(lambda: self.state(base)[0] == "live")
        rollback = time.monotonic() - began
        time.sleep(1)
        counts = self.table.finish()
        recall, lost = self.compare(base)
        return {
            "rows": rows, "queries": counts.queries, "mixed_queries": counts.mixed, "repeated_queries": counts.repeated,
            "recall": round(recall, 4), "lost_rows": lost, "rollback_seconds": round(rollback, 3), "killed_in": killed,
            "rows_per_second": round(rate, 1), "encoder_per_second": round(encoder, 1),
            "rows_to_encoder": round(rate / encoder, 3),
        }  # fmt: skip

    def release(self, clip: str | None) -> None:
        self.number += 1
        self.ledger.commit_release(
            self.number, clip=clip, vlm=None, actor="bench", reason="bench index", proposal_id=None
        )

    def state(self, space: str) -> tuple[str, int]:
        """The state of a space, and its rows."""
        rows = self.ledger.index_spaces("found")
        return next(((row.state, row.rows) for row in rows if row.space == space), ("", 0))

    def counted_at(self) -> datetime:
        return max(row.updated_at for row in self.ledger.index_spaces("found"))

    def fill_rate(self, space: str, rows: int) -> float:
        """Rows a second, from the first rows that are counted to the last."""
        wait(lambda: self.state(space)[1] >= min(4 * PAGE_ROWS, rows // 2), FILL_PAUSE)
        began, first = time.monotonic(), self.state(space)[1]
        wait(lambda: self.state(space)[1] == rows, FILL_PAUSE)
        return (rows - first) / (time.monotonic() - began)

    def upgrade(self, new: str) -> list[str]:
        """Prepare a release of the adapter, and make it live; kill the worker once in each state that is seen."""
        killed: list[str] = []
        proposal = self.ledger.propose("release", clip=self.encode.adapter, actor="bench", reason="bench index")
        self.ledger.advance_proposal(proposal.id, "preparing")
        while "live" not in killed:
            state = self.state(new)[0]
            if state in KILLED_IN and state not in killed:
                self.table.kill_worker()
                killed.append(state)
                self.table.start_worker()
                if state == "ready":
                    self.ledger.advance_proposal(proposal.id, "failed", "released by the benchmark")
                    self.release(self.encode.adapter)
            time.sleep(0.001)
        return killed

    def encoder_rate(self) -> float:
        """Images a second."""
        engine = self.encode.engine
        pixels = np.stack([engine.base.preprocess.pixels(picture(seed)) for seed in range(PAGE_ROWS)])
        engine.encode_images(pixels)
        began, count = time.monotonic(), 0
        while (took := time.monotonic() - began) < ENCODER_SECONDS:
            engine.encode_images(pixels)
            count += PAGE_ROWS
        return count / took

    def compare(self, space: str) -> tuple[float, int]:
        """Recall@10 of clients against a whole re-embedding, and the number of rows without the right vector."""
        with step("embedding everything again"):
            images = self.table.images()
            exact = self.encode([image for _, image in images], space)
        stored, places = self.table.vectors(), {id: place for place, (id, _) in enumerate(images)}
        lost = sum(
            id not in stored or vector @ stored[id] < SAME for (id, _), vector in zip(images, exact, strict=True)
        )
        shares = []
        for vector in self.encode([picture((1 << 50) + seed) for seed in range(QUERIES)], space):
            scores = exact @ vector
            hits = scores[[places[id] for id in self.table.nearest(vector)]]
            shares.append(np.sum(hits >= np.sort(scores)[-NEIGHBOURS] - 1e-4) / NEIGHBOURS)
        return float(np.mean(shares)), int(lost)


def run(settings: Settings, rows: int, qdrant_rows: int, base: str) -> dict[str, Any]:
    """Measure in new homes. ``base``: a registered CLIP, or an architecture that gets random weights."""

    def measured(name: str, count: int, make_table: Callable[[Settings, Encoder], Table]) -> dict[str, Any]:
        progress_log.info(f"{name}: {count:,} rows")
        with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as folder:
            home = bench_home(settings, Path(folder), clip_base(settings, base))
            (adapter,) = make_adapters(home, 1)
            encode = Encoder(home, adapter)
            table = make_table(home, encode)
            try:
                return IndexRun(Ledger.open(home.ledger), encode, table).measure(count)
            finally:
                table.close()

    figures: dict[str, Any] = {}
    if rows:
        with postgres_server(binaries=with_pgvector()) as server:
            figures["pgvector"] = measured(
                "pgvector", rows, lambda home, encode: PgvectorTable(home, server.url, encode)
            )
    if qdrant_rows:
        figures["qdrant"] = measured("qdrant", qdrant_rows, lambda home, encode: QdrantTable(home, encode.adapter))
    return {**figures, "base": base, "machine": machine()}


def show(figures: dict[str, Any]) -> None:
    stores = [name for name in ("pgvector", "qdrant") if name in figures]
    table = Shown("", *stores, title=f"An index that follows a release and a rollback, base {figures['base']}")
    for key in figures[stores[0]]:
        values = [figures[store][key] for store in stores]
        table.add_row(key, *(", ".join(each) if isinstance(each, list) else f"{each:,}" for each in values))
    show_table(table, figures)


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = bench_parser("index", __doc__)
    parser.add_argument("--rows", type=int, default=100_000, help="in PostgreSQL (100,000; 0: leave it out)")
    parser.add_argument("--qdrant-rows", type=int, default=2_000, help="in Qdrant (2,000; 0: leave it out)")
    parser.add_argument("--base", default="ViT-B-32", help="a registered CLIP, or an architecture with random weights")
    options = parser.parse_args(arguments)
    chosen = options.rows, options.qdrant_rows
    if not any(chosen) or any(0 < each < 500 for each in chosen):
        parser.error("--rows and --qdrant-rows must be 500 or more, or one of them 0")
    show(run(settings, *chosen, options.base))
