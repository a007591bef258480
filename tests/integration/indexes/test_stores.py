"""The contract of an index store, with a real PostgreSQL and Qdrant."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psycopg
import pytest
from psycopg.sql import SQL
from qdrant_client import QdrantClient
from qdrant_client import models as m

from core.ledger.rows import IndexRow
from serving.indexes.contract import IndexStoreContract
from serving.indexes.store import IndexStore, Vector, open_store
from tests.support.postgres import PostgresServer


def an_index(url: str, source: str, id: str = "id", name: str = "found") -> IndexRow:
    return IndexRow(name=name, url=url, source=source, id_field=id, image_field="image")


class TestPgvector(IndexStoreContract):
    id_type = "int"

    @pytest.fixture(autouse=True)
    def table(self, pgvector: PostgresServer) -> Iterator[None]:
        self.url = pgvector.url
        self.stores: list[IndexStore] = []
        with psycopg.connect(self.url, autocommit=True) as self.user:
            self.user.execute("drop schema public cascade; create schema public")
            self.user.execute(
                SQL("create table photos (id {} primary key, image text, title text)").format(SQL(self.id_type))
            )
            yield
        for store in self.stores:
            store.close()

    def store(self) -> IndexStore:
        self.stores.append(open_store(an_index(self.url, "photos")))
        return self.stores[-1]

    def put(self, id: str, image: str) -> None:
        self.user.execute(
            "insert into photos values (%s, %s, 'a') on conflict (id) do update set image = excluded.image", (id, image)
        )

    def delete(self, id: str) -> None:
        self.user.execute("delete from photos where id = %s", (id,))

    def read(self) -> tuple[str, dict[str, Vector]]:
        rows = self.user.execute("select id::text, embedding::text, space from found").fetchall()
        (space,) = {space for _, _, space in rows}
        return space, {id: np.array(eval(vector), np.float32) for id, vector, _ in rows}


class TestPgvectorWithTextIds(TestPgvector):
    id_type = "text"


class TestQdrant(IndexStoreContract):
    @pytest.fixture(autouse=True)
    def collection(self, tmp_path: Path) -> Iterator[None]:
        server = os.environ.get("RATCHET_TEST_QDRANT")
        self.url = f"qdrant://{server}" if server else f"qdrant://{tmp_path / 'qdrant'}"
        self.user = QdrantClient(f"http://{server}") if server else QdrantClient(path=str(tmp_path / "qdrant"))
        for each in self.user.get_collections().collections:
            self.user.delete_collection(each.name)
        self.user.create_collection("photos", {})
        if not server:
            self.user.close()
        self._store: IndexStore | None = None
        yield
        if self._store is not None:
            self._store.close()
        self.user.close()

    def store(self) -> IndexStore:
        if self._store is None:  # one process, and one client, may use a folder
            self._store = open_store(an_index(self.url, "photos"))
            if "127.0.0.1" not in self.url and not os.environ.get("RATCHET_TEST_QDRANT"):
                self.user = self._store._client  # type: ignore[attr-defined]
        return self._store

    def put(self, id: str, image: str) -> None:
        self.store()
        self.user.upsert("photos", [m.PointStruct(id=int(id), vector={}, payload={"image": image, "title": "a"})])

    def delete(self, id: str) -> None:
        self.user.delete("photos", [int(id)])

    def read(self) -> tuple[str, dict[str, Vector]]:
        points, _ = self.user.scroll("found", limit=100, with_vectors=True)
        (space,) = {point.payload["space"] for point in points if point.payload}
        return space, {str(point.id): np.array(point.vector, np.float32) for point in points}
