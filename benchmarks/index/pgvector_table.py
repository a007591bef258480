"""A table in a real PostgreSQL with pgvector, and a real ``ratchet index run``."""

from __future__ import annotations

import subprocess
import threading
import time
from typing import Final

import numpy as np
import orjson
import psycopg

from benchmarks.index.table import NEIGHBOURS, SEARCH_PAUSE, WRITE_PAUSE, Encoder, SearchCounts, picture, random_row
from core.child_process import ratchet_command
from core.ledger.rows import IndexRow
from core.settings import Settings
from serving.indexes.pgvector import EF_SEARCH
from serving.indexes.store import Vector

CATCH_UP_PAUSE: Final = 0.5


class PgvectorTable:
    def __init__(self, settings: Settings, url: str, encode: Encoder) -> None:
        self.settings, self.url, self.encode = settings, url, encode
        self.index = IndexRow(name="found", url=url, source="photos", id_field="id", image_field="image")
        self.user = psycopg.connect(url, autocommit=True)
        self.user.execute(f"set hnsw.ef_search = {EF_SEARCH}")
        self.rows, self.counts = 0, SearchCounts()
        self.stopping = threading.Event()
        self.clients = [threading.Thread(target=each, daemon=True) for each in (self.search, self.write)]
        self.worker: subprocess.Popen[bytes] | None = None

    def fill(self, rows: int) -> None:
        self.rows = rows
        with self.user.cursor() as cursor:
            cursor.execute("create table photos (id bigint primary key, image bytea)")
            with cursor.copy("copy photos from stdin") as copy:
                for id in range(rows):
                    copy.write_row((id, picture(id)))

    def start_worker(self) -> None:
        flags = [f"home={self.settings.home}", f"base.clip={self.settings.base.clip}"]
        self.worker = subprocess.Popen(ratchet_command("index", "run", flags=flags))

    def kill_worker(self) -> None:
        if self.worker is not None:
            self.worker.kill()
            self.worker.wait()

    def start_clients(self) -> None:
        for client in self.clients:
            client.start()

    def search(self) -> None:
        """The guide's recipe, again and again."""
        with psycopg.connect(self.url, autocommit=True) as client:
            client.execute(f"set hnsw.ef_search = {EF_SEARCH}")
            while not self.stopping.wait(SEARCH_PAUSE):
                (space,) = client.execute("select space from found limit 1").fetchone() or ("",)
                query = self.encode([picture(self.counts.queries)], space)[0]
                rows = client.execute(
                    "select image, embedding::text, space from found where space = %s "
                    "order by embedding <=> %s::vector limit %s", (space, str(query.tolist()), NEIGHBOURS),
                ).fetchall()  # fmt: skip
                if not rows:
                    self.counts.repeated += 1
                    continue
                vector, spaces = np.array(orjson.loads(rows[0][1]), np.float32), {row[2] for row in rows}
                self.counts.queries += 1
                self.counts.mixed += self.encode.is_mixed(rows[0][0], vector, spaces, space)

    def write(self) -> None:
        """Change and add rows."""
        with psycopg.connect(self.url, autocommit=True) as client:
            chance = np.random.default_rng(1)
            while not self.stopping.wait(WRITE_PAUSE):
                client.execute(
                    "insert into photos values (%s, %s) on conflict (id) do update set image = excluded.image",
                    random_row(chance, self.rows),
                )

    def finish(self) -> SearchCounts:
        self.stopping.set()
        for client in self.clients:
            client.join()
        (space,) = self.user.execute("select space from found limit 1").fetchone() or ("",)
        pending = f'select from "ratchet_photos_{space}" where embedding is null limit 1'
        while self.user.execute(pending).fetchone() is not None:
            time.sleep(CATCH_UP_PAUSE)
        if self.worker is not None:
            self.worker.terminate()
            self.worker.wait()
        return self.counts

    def images(self) -> list[tuple[int, bytes]]:
        return self.user.execute("select id, image from photos order by id").fetchall()

    def vectors(self) -> dict[int, Vector]:
        rows = self.user.execute("select id, embedding::text from found").fetchall()
        return {id: np.array(orjson.loads(text), np.float32) for id, text in rows}

    def nearest(self, vector: Vector) -> set[int]:
        query = "select id from found order by embedding <=> %s::vector limit %s"
        return {id for (id,) in self.user.execute(query, (str(vector.tolist()), NEIGHBOURS)).fetchall()}

    def close(self) -> None:
        self.stopping.set()
        self.kill_worker()
        self.user.close()
