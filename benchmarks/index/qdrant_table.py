"""A collection in Qdrant's local mode with images by URI. Its storage belongs to one process, so the worker's steps,
the client that searches and the one that writes are threads of a child process, which is what gets SIGKILL."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Final
from uuid import uuid4

import numpy as np
from qdrant_client import QdrantClient
from qdrant_client import models as m

from benchmarks.index.table import NEIGHBOURS, SEARCH_PAUSE, WRITE_PAUSE, Encoder, Seen, picture
from core.errors import RatchetError
from core.ledger import Ledger
from core.ledger.rows import IndexRow
from core.settings import Settings
from serving.indexes.qdrant import QdrantStore
from serving.indexes.store import Vector
from serving.indexes.worker import POLL_SECONDS, IndexKeeper, RowEmbedder
from streams.records.uris import UriFetcher

SOURCE, ALIAS = "photos", "found"
PAGE: Final = 500
STARTED, ENDED, SEEN = "started", "ended", "seen"
GOOD, MIXED, REPEATED = "good", "mixed", "repeated"


@dataclass
class Pictures:
    """Image files of the user; each change of an image is a new file, as its URI is its version."""

    folder: Path

    def point(self, id: int, image: bytes) -> m.PointStruct:
        path = self.folder / f"{uuid4().hex}.jpg"
        path.write_bytes(image)
        return m.PointStruct(id=id, vector={}, payload={"url": path.as_uri()})


class Child:
    """In the process that has the storage. Files in ``folder`` say what it shall do, as locks do not outlive a kill."""

    def __init__(self, settings: Settings, adapter: str, folder: Path, rows: int) -> None:
        self.folder, self.pictures, self.rows = folder, Pictures(folder / "pictures"), rows
        index = index_row(folder)
        self.store = QdrantStore(index)
        ledger = Ledger.open(settings.ledger)
        self.keeper = IndexKeeper(index, ledger, RowEmbedder(settings, ledger), opener=lambda _: self.store)
        self.clients_ended = threading.Event()
        self.encode, self.fetch = Encoder(settings, adapter), UriFetcher(settings.ingest).fetch

    def run(self) -> None:
        """Until the clients have ended, and nothing is pending."""
        steps = [threading.Thread(target=self.repeat, args=(step,)) for step in (self.keeper.fill, self.keeper.flip)]
        clients = [threading.Thread(target=each) for each in (self.search, self.write)]
        for step in steps:
            step.start()
        while not (self.folder / STARTED).exists():
            time.sleep(POLL_SECONDS)
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        self.clients_ended.set()
        for step in steps:
            step.join()
        self.keeper.close()

    def going_on(self, pause: float) -> bool:
        time.sleep(pause)
        return not (self.folder / ENDED).exists()

    def repeat(self, step: Callable[[], bool]) -> None:
        last = more = False
        while more or not last:
            last = self.clients_ended.wait(0 if more else POLL_SECONDS)
            try:
                more = step()
            except RatchetError:  # e.g. it is not verified yet
                more = False

    def search(self) -> None:
        """The guide's recipe; a letter for each answer goes to a file."""
        seen = Seen()
        with (self.folder / SEEN).open("a", buffering=1) as file:
            while self.going_on(SEARCH_PAUSE):
                space = str(self.store._do("scroll", ALIAS, limit=1)[0][0].payload["space"])
                vector = self.encode([picture(time.monotonic_ns())], space)[0].tolist()
                where = m.Filter(must=[m.FieldCondition(key="space", match=m.MatchValue(value=space))])
                hits = {"query_filter": where, "limit": NEIGHBOURS, "with_vectors": True}
                found = self.store._do("query_points", ALIAS, vector, **hits).points
                if not found:
                    print(REPEATED, file=file)
                    continue
                mixed, spaces = seen.mixed, {point.payload["space"] for point in found}
                image, stored = self.fetch(found[0].payload["url"]), np.array(found[0].vector, np.float32)
                seen.note(image, stored, spaces, space, self.encode)
                print(MIXED if seen.mixed > mixed else GOOD, file=file)

    def write(self) -> None:
        """Change and add rows."""
        chance = np.random.default_rng(time.monotonic_ns())
        while self.going_on(WRITE_PAUSE):
            id, seed = int(chance.integers(self.rows * 11 // 10)), int(chance.integers(1 << 40, 1 << 41))
            self.store._do("upsert", SOURCE, [self.pictures.point(id, picture(seed))])


def run_child(settings: Settings, adapter: str, folder: Path, rows: int) -> None:
    Child(settings, adapter, folder, rows).run()


def index_row(folder: Path) -> IndexRow:
    return IndexRow(name=ALIAS, url=f"qdrant://{folder / 'qdrant'}", source=SOURCE, id_field="id", image_field="url")


class QdrantTable:
    def __init__(self, settings: Settings, folder: Path, adapter: str) -> None:
        self.folder, self.adapter, self.rows = folder, adapter, 0
        self.pictures = Pictures(folder / "pictures")
        self.pictures.folder.mkdir(parents=True)
        ingest = settings.ingest.model_copy(update={"allowed_uris": [self.pictures.folder.as_uri()]})
        self.settings, self.index = settings.model_copy(update={"ingest": ingest}), index_row(folder)
        self.worker: SpawnProcess | None = None

    def fill(self, rows: int) -> None:
        self.rows = rows
        with closing(self.opened()) as client:
            client.create_collection(SOURCE, {})
            for start in range(0, rows, PAGE):
                ids = range(start, min(rows, start + PAGE))
                client.upsert(SOURCE, [self.pictures.point(id, picture(id)) for id in ids])

    def start_worker(self) -> None:
        values = (self.settings, self.adapter, self.folder, self.rows)
        self.worker = multiprocessing.get_context("spawn").Process(target=run_child, args=values)
        self.worker.start()

    def end_worker(self, kill: bool = False) -> None:
        if self.worker is not None and self.worker.is_alive():
            (self.worker.kill if kill else self.worker.terminate)()
            self.worker.join()

    def start_clients(self) -> None:
        (self.folder / STARTED).touch()

    def finish(self) -> Seen:
        (self.folder / ENDED).touch()
        if self.worker is not None:
            self.worker.join()
        good, mixed, repeated = map((self.folder / SEEN).read_text().count, (GOOD, MIXED, REPEATED))
        return Seen(good + mixed, mixed, repeated)

    def images(self) -> list[tuple[int, bytes]]:
        fetch = UriFetcher(self.settings.ingest).fetch
        return [(int(point.id), fetch((point.payload or {})["url"])) for point in self.points(SOURCE)]

    def vectors(self) -> dict[int, Vector]:
        return {int(point.id): np.array(point.vector, np.float32) for point in self.points(ALIAS)}

    def nearest(self, vector: Vector) -> set[int]:
        with closing(self.opened()) as client:
            return {int(point.id) for point in client.query_points(ALIAS, vector.tolist(), limit=NEIGHBOURS).points}

    def close(self) -> None:
        self.end_worker(kill=True)

    def points(self, collection: str) -> list[m.Record]:
        with closing(self.opened()) as client:
            return client.scroll(collection, limit=2 * self.rows, with_vectors=True)[0]

    def opened(self) -> QdrantClient:
        return QdrantClient(path=str(self.folder / "qdrant"))
