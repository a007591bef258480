"""A collection in Qdrant's local mode with images by URI. Its storage belongs to one process, so the worker's steps,
the client that searches and the one that writes are threads of a child process, which is what gets SIGKILL."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from contextlib import closing
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Final
from uuid import uuid4

import numpy as np
from qdrant_client import QdrantClient
from qdrant_client import models as m

from benchmarks.index.table import NEIGHBOURS, SEARCH_PAUSE, WRITE_PAUSE, Encoder, SearchCounts, picture, random_row
from core.errors import RatchetError
from core.ledger import Ledger
from core.ledger.rows import IndexRow
from core.settings import Settings
from serving.indexes.qdrant import QdrantStore
from serving.indexes.store import Vector
from serving.indexes.worker import POLL_SECONDS, IndexKeeper, RowEmbedder
from streams.records.uris import UriFetcher

SOURCE, ALIAS = "photos", "found"
PICTURES: Final = "pictures"
PAGE: Final = 500
STARTED, ENDED, ANSWERS = "started", "ended", "answers"
GOOD, MIXED, REPEATED = "good", "mixed", "repeated"


def point(folder: Path, id: int, image: bytes) -> m.PointStruct:
    """A row whose image is a new file: its URI is its version."""
    path = folder / PICTURES / f"{uuid4().hex}.jpg"
    path.write_bytes(image)
    return m.PointStruct(id=id, vector={}, payload={"url": path.as_uri()})


class Child:
    """In the process that has the storage. Files in the home say what it shall do: locks would not survive a kill."""

    def __init__(self, settings: Settings, adapter: str, rows: int) -> None:
        self.folder, self.rows = settings.home, rows
        index = index_row(self.folder)
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
        """The guide's recipe; a word for each answer goes to a file."""
        with (self.folder / ANSWERS).open("a", buffering=1) as file:
            while self.going_on(SEARCH_PAUSE):
                space = str(self.store._do("scroll", ALIAS, limit=1)[0][0].payload["space"])
                vector = self.encode([picture(time.monotonic_ns())], space)[0].tolist()
                where = m.Filter(must=[m.FieldCondition(key="space", match=m.MatchValue(value=space))])
                hits = {"query_filter": where, "limit": NEIGHBOURS, "with_vectors": True}
                points = self.store._do("query_points", ALIAS, vector, **hits).points
                if not points:
                    print(REPEATED, file=file)
                    continue
                image, stored = self.fetch(points[0].payload["url"]), np.array(points[0].vector, np.float32)
                spaces = {each.payload["space"] for each in points}
                print(MIXED if self.encode.is_mixed(image, stored, spaces, space) else GOOD, file=file)

    def write(self) -> None:
        """Change and add rows."""
        chance = np.random.default_rng(time.monotonic_ns())
        while self.going_on(WRITE_PAUSE):
            self.store._do("upsert", SOURCE, [point(self.folder, *random_row(chance, self.rows))])


def run_child(settings: Settings, adapter: str, rows: int) -> None:
    Child(settings, adapter, rows).run()


def index_row(folder: Path) -> IndexRow:
    return IndexRow(name=ALIAS, url=f"qdrant://{folder / 'qdrant'}", source=SOURCE, id_field="id", image_field="url")


class QdrantTable:
    def __init__(self, settings: Settings, adapter: str) -> None:
        self.folder, self.adapter, self.rows = settings.home, adapter, 0
        pictures = self.folder / PICTURES
        pictures.mkdir()
        ingest = settings.ingest.model_copy(update={"allowed_uris": [pictures.as_uri()]})
        self.settings, self.index = settings.model_copy(update={"ingest": ingest}), index_row(self.folder)
        self.worker: SpawnProcess | None = None

    def fill(self, rows: int) -> None:
        self.rows = rows
        with closing(self.opened()) as client:
            client.create_collection(SOURCE, {})
            for start in range(0, rows, PAGE):
                ids = range(start, min(rows, start + PAGE))
                client.upsert(SOURCE, [point(self.folder, id, picture(id)) for id in ids])

    def start_worker(self) -> None:
        values = (self.settings, self.adapter, self.rows)
        self.worker = multiprocessing.get_context("spawn").Process(target=run_child, args=values)
        self.worker.start()

    def kill_worker(self) -> None:
        if self.worker is not None:
            self.worker.kill()
            self.worker.join()

    def start_clients(self) -> None:
        (self.folder / STARTED).touch()

    def finish(self) -> SearchCounts:
        (self.folder / ENDED).touch()
        if self.worker is not None:
            self.worker.join()
        good, mixed, repeated = map((self.folder / ANSWERS).read_text().count, (GOOD, MIXED, REPEATED))
        return SearchCounts(good + mixed, mixed, repeated)

    def images(self) -> list[tuple[int, bytes]]:
        fetch = UriFetcher(self.settings.ingest).fetch
        return [(int(each.id), fetch((each.payload or {})["url"])) for each in self.points(SOURCE)]

    def vectors(self) -> dict[int, Vector]:
        return {int(each.id): np.array(each.vector, np.float32) for each in self.points(ALIAS)}

    def nearest(self, vector: Vector) -> set[int]:
        with closing(self.opened()) as client:
            return {int(each.id) for each in client.query_points(ALIAS, vector.tolist(), limit=NEIGHBOURS).points}

    def close(self) -> None:
        self.kill_worker()

    def points(self, collection: str) -> list[m.Record]:
        with closing(self.opened()) as client:
            return client.scroll(collection, limit=2 * self.rows, with_vectors=True)[0]

    def opened(self) -> QdrantClient:
        return QdrantClient(path=str(self.folder / "qdrant"))
