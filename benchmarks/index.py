"""``ratchet bench index``: an index in pgvector follows a release and a rollback while its worker is killed.

A real PostgreSQL with pgvector and a real ``ratchet index run``, which gets SIGKILL in each state of the new space. A
client searches all the time as the guide says, and embeds the query itself in place of ``/v1/embeddings``; another
changes and adds rows. Releases are written to the ledger when the index is ready, as the controller does. The base has
random weights. Of each answer the nearest row is embedded again: a query is mixed if that gives another vector.
``recall`` is recall@10 of clients against exact search in a whole re-embedding; a row is lost if clients do not find
the vector of its last image. ``rows_to_encoder`` is the rate of a fill over that of the encoder alone, before and after.
"""

from __future__ import annotations

import io
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson
import psycopg
from PIL import Image

from benchmarks.bench_home import bench_home, clip_base
from benchmarks.command import bench_parser, show_figures
from benchmarks.machine import machine
from benchmarks.swap import make_adapters
from core.child_process import ratchet_command
from core.errors import RatchetError
from core.ledger import Ledger
from core.ledger.rows import IndexRow
from core.progress import progress_log, step
from core.settings import Settings
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import load_base
from serving.indexes.pgvector import EF_SEARCH
from serving.indexes.worker import PAGE_ROWS
from tests.support.postgres import postgres_server, with_pgvector

QUERIES: Final = 50
KILLED_IN: Final = ("planned", "filling", "verified", "ready", "live")
ENCODER_SECONDS: Final = 5.0
WRITE_PAUSE: Final = 0.5
SEARCH_PAUSE: Final = 0.1
COUNT_PAUSE: Final = 0.5
"""Counting reads the whole table, and would slow down what is measured."""
LIMIT_SECONDS: Final = 7200.0
Vectors = np.ndarray


def picture(seed: int) -> bytes:
    """A picture that no other seed gives, 128 x 128."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((128, 128), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def wait(condition: Callable[[], object], pause: float = 0.005) -> None:
    until = time.monotonic() + LIMIT_SECONDS
    while not condition():
        if time.monotonic() > until:
            raise RatchetError("the index did not follow in time.", "Look at the worker's output.")
        time.sleep(pause)


class Run:
    def __init__(self, settings: Settings, url: str, rows: int) -> None:
        self.settings, self.url, self.rows = settings, url, rows
        self.ledger = Ledger.open(settings.ledger)
        (self.adapter,) = make_adapters(settings, 1)
        self.engine = ClipEngine.of(settings, load_base(settings.home, settings.base.clip))
        self.engine.load(self.adapter, settings.home / "random" / "0")
        self.clips: dict[str, str | None] = {self.engine.spaces(clip).image: clip for clip in (None, self.adapter)}
        self.user = psycopg.connect(url, autocommit=True)
        self.stopping = threading.Event()
        self.queries = self.mixed = self.repeated = self.killed = self.number = 0
        self.worker: subprocess.Popen[bytes] | None = None

    def start_worker(self) -> None:
        flags = [f"home={self.settings.home}", f"base.clip={self.settings.base.clip}"]
        self.worker = subprocess.Popen(ratchet_command("index", "run", flags=flags))

    def end_worker(self, kill: bool = False) -> None:
        if self.worker is not None:
            (self.worker.kill if kill else self.worker.terminate)()
            self.worker.wait()

    def release(self, clip: str | None) -> None:
        self.number += 1
        self.ledger.commit_release(
            self.number, clip=clip, vlm=None, actor="bench", reason="bench index", proposal_id=None
        )

    def state(self, space: str) -> str:
        rows = self.ledger.index_spaces("found")
        return next((row.state for row in rows if row.space == space), "")

    def embed(self, images: Sequence[bytes], space: str) -> Vectors:
        pixels = np.stack([self.engine.base.preprocess.pixels(image) for image in images])
        parts = [pixels[at : at + PAGE_ROWS] for at in range(0, len(pixels), PAGE_ROWS)]
        return np.concatenate([self.engine.encode_images(part, self.clips[space]) for part in parts])

    def search(self) -> None:
        """The guide's recipe, again and again."""
        with psycopg.connect(self.url, autocommit=True) as client:
            client.execute(f"set hnsw.ef_search = {EF_SEARCH}")
            while not self.stopping.wait(SEARCH_PAUSE):
                (space,) = client.execute("select space from found limit 1").fetchone() or ("",)
                query = self.embed([picture(self.queries)], space)[0]
                rows = client.execute(
                    "select image, embedding::text, space from found where space = %s "
                    "order by embedding <=> %s::vector limit 10", (space, str(query.tolist())),
                ).fetchall()  # fmt: skip
                if not rows:
                    self.repeated += 1
                    continue
                again = self.embed([rows[0][0]], space)[0] @ np.array(orjson.loads(rows[0][1]))
                self.queries += 1
                self.mixed += again < 0.999 or {row[2] for row in rows} != {space}

    def write(self) -> None:
        with psycopg.connect(self.url, autocommit=True) as client:
            chance = np.random.default_rng(1)
            while not self.stopping.wait(WRITE_PAUSE):
                id, seed = int(chance.integers(self.rows * 11 // 10)), int(chance.integers(1 << 40, 1 << 41))
                client.execute(
                    "insert into photos values (%s, %s) on conflict (id) do update set image = excluded.image",
                    (id, picture(seed)),
                )

    def pending(self, space: str) -> int:
        """Rows without a vector."""
        with suppress(psycopg.errors.UndefinedColumn):
            query = f'select count(*) from photos where "ratchet_{space}" is null'  # noqa: S608
            return int((self.user.execute(query).fetchone() or (0,))[0])
        return self.rows

    def wait_for_all(self, space: str) -> None:
        query = f'select from photos where "ratchet_{space}" is null limit 1'  # noqa: S608
        wait(lambda: self.user.execute(query).fetchone() is None, COUNT_PAUSE)

    def measure(self) -> dict[str, Any]:
        base, new = self.clips
        with step("making rows"), self.user.cursor() as cursor:
            cursor.execute("create table photos (id bigint primary key, image bytea)")
            with cursor.copy("copy photos from stdin") as copy:
                for id in range(self.rows):
                    copy.write_row((id, picture(id)))
        index = IndexRow(name="found", url=self.url, source="photos", id_field="id", image_field="image")
        self.ledger.add_index(index, actor="bench")
        self.release(None)
        before = self.encoder_rate()
        self.start_worker()
        wait(lambda: self.pending(base) <= self.rows - 4 * PAGE_ROWS, COUNT_PAUSE)
        began, first = time.monotonic(), self.pending(base)
        self.wait_for_all(base)
        rate = first / (time.monotonic() - began)
        wait(lambda: self.state(base) == "live")
        encoder = (before + self.encoder_rate()) / 2
        threads = [threading.Thread(target=each, daemon=True) for each in (self.search, self.write)]
        for thread in threads:
            thread.start()
        killed = self.upgrade(new)
        progress_log.info(f"killed in {', '.join(killed)}; now back")
        began = time.monotonic()
        self.release(None)
        wait(lambda: self.user.execute("select space from found limit 1").fetchone() == (base,))
        rollback = time.monotonic() - began
        time.sleep(1)
        self.stopping.set()
        for thread in threads:
            thread.join()
        self.wait_for_all(base)
        recall, lost = self.compare(base)
        return {
            "rows": self.rows, "queries": self.queries, "mixed_queries": int(self.mixed),
            "repeated_queries": self.repeated, "recall": round(recall, 4), "lost_rows": lost,
            "rollback_seconds": round(rollback, 3), "killed_in": killed, "rows_per_second": round(rate, 1),
            "encoder_per_second": round(encoder, 1), "rows_to_encoder": round(rate / encoder, 3),
            "base": self.settings.base.clip, "machine": machine(),
        }  # fmt: skip

    def upgrade(self, new: str) -> list[str]:
        """Prepare a release of the adapter, and make it live; kill the worker once in each state that is seen."""
        killed: list[str] = []
        proposal = self.ledger.propose("release", clip=self.adapter, actor="bench", reason="bench index")
        self.ledger.advance_proposal(proposal.id, "preparing")
        while "live" not in killed:
            state = self.state(new)
            if state in KILLED_IN and state not in killed:
                self.end_worker(kill=True)
                killed.append(state)
                self.start_worker()
                if state == "ready":
                    self.ledger.advance_proposal(proposal.id, "failed", "released by the benchmark")
                    self.release(self.adapter)
            time.sleep(0.001)
        self.wait_for_all(new)
        return killed

    def encoder_rate(self) -> float:
        """Images a second."""
        pixels = np.stack([self.engine.base.preprocess.pixels(picture(seed)) for seed in range(PAGE_ROWS)])
        self.engine.encode_images(pixels)
        began, count = time.monotonic(), 0
        while (took := time.monotonic() - began) < ENCODER_SECONDS:
            self.engine.encode_images(pixels)
            count += PAGE_ROWS
        return count / took

    def compare(self, space: str) -> tuple[float, int]:
        """Recall@10 of clients against a whole re-embedding, and the number of rows without the right vector."""
        with step("embedding everything again"):
            rows = self.user.execute("select id, image from photos order by id").fetchall()
            exact = self.embed([image for _, image in rows], space)
        stored: dict[int, str] = dict(self.user.execute("select id, embedding::text from found").fetchall())
        near = [
            id in stored and vector @ np.array(orjson.loads(stored[id])) >= 0.999
            for (id, _), vector in zip(rows, exact, strict=True)
        ]
        lost = len(near) - int(np.sum(near))
        self.user.execute(f"set hnsw.ef_search = {EF_SEARCH}")
        shares = []
        for vector in self.embed([picture(-1 - seed + (1 << 50)) for seed in range(QUERIES)], space):
            nearest = np.sort(exact @ vector)[-10]
            found = self.user.execute(
                "select id from found order by embedding <=> %s::vector limit 10", (str(vector.tolist()),)
            )
            ids = {id for (id,) in found.fetchall()}
            scores = [float(each @ vector) for (id, _), each in zip(rows, exact, strict=True) if id in ids]
            shares.append(np.mean([score >= nearest - 1e-4 for score in scores]) if scores else 0.0)
        return float(np.mean(shares)), lost


def run(settings: Settings, rows: int = 100_000, base: str = "ViT-B-32") -> dict[str, Any]:
    """Measure in a new home. ``base``: a registered CLIP, or an architecture that gets random weights."""
    with (
        tempfile.TemporaryDirectory(prefix="ratchet-bench-") as folder,
        postgres_server(binaries=with_pgvector()) as server,
    ):
        measured = Run(bench_home(settings, Path(folder), clip_base(settings, base)), server.url, rows)
        try:
            return measured.measure()
        finally:
            measured.stopping.set()
            measured.end_worker()
            measured.user.close()


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = bench_parser("index", __doc__)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the table (100,000; at least 500)")
    parser.add_argument("--base", default="ViT-B-32", help="a registered CLIP, or an architecture with random weights")
    options = parser.parse_args(arguments)
    if options.rows < 500:
        parser.error("--rows must be 500 or more")
    show_figures("An index that follows a release and a rollback", run(settings, options.rows, options.base))
