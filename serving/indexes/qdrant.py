"""An index in Qdrant: a collection ``<source>_<space>`` for each image space, and an alias that names the live one.
Pending are the points of the user's collection without the payload ``ratchet_<space>``, which an upsert removes.
Payloads are copied with the vectors. ``qdrant:///path`` is qdrant-client's local mode, for one process."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
from qdrant_client import QdrantClient
from qdrant_client import models as m

from core.errors import ConfigError, StoreUnavailable
from core.ledger.rows import IndexRow
from serving.indexes.store import RETRY_SECONDS, Counts, PendingRow, Skip, Vector

SECONDS: Final = 30
SKIPPED, RETRY = "ratchet_skipped", "ratchet_retry"
"""Payload of a point that cannot be embedded: why, and when to try again (seconds since the epoch)."""
BUILD_SECONDS: Final = 0.5


class QdrantStore:
    def __init__(self, index: IndexRow) -> None:
        url = urlsplit(index.url)
        self._name, self._source, self._image = index.name, index.source, index.image_field
        if index.id_field != "id":
            raise ConfigError("points of Qdrant are named by their ID.", "Say --id id.")
        self._lock: AbstractContextManager[Any] = nullcontext() if url.netloc else threading.RLock()
        if url.netloc:
            secure = "tls" in url.query
            address = f"{'https' if secure else 'http'}://{url.hostname}:{url.port or 6333}"
            key = os.environ.get("RATCHET_QDRANT_API_KEY")
            self._client = QdrantClient(address, api_key=key, timeout=SECONDS, check_compatibility=False)
        else:
            self._client = QdrantClient(path=url.path, force_disable_check_same_thread=True)
        if not self._do("collection_exists", self._source):
            raise ConfigError(f"Qdrant has no collection {self._source!r}.", "Name the one with your points.")

    def open(self, space: str, dim: int) -> None:
        if not self._do("collection_exists", self._of(space)):
            self._do("create_collection", self._of(space), m.VectorParams(size=dim, distance=m.Distance.COSINE))

    def pending(self, space: str, limit: int, after: str | None = None) -> Sequence[PendingRow]:
        due = [_is_empty(SKIPPED), m.FieldCondition(key=RETRY, range=m.Range(lt=time.time()))]
        where = m.Filter(must=[_is_empty(f"ratchet_{space}"), m.Filter(should=due)], must_not=[_is_empty(self._image)])
        start = None if after is None else _id(after)
        points, _ = self._do("scroll", self._source, where, limit + 1, offset=start, with_payload=[self._image])
        rows = [(str(point.id), str(point.payload[self._image])) for point in points]
        return [PendingRow(id, image, image) for id, image in rows if id != after][:limit]

    def write(self, space: str, rows: Sequence[tuple[PendingRow, Vector | Skip]]) -> int:
        """Vectors come first, then the marks of the points that are still the same: a kill between the two only repeats
        the vectors."""
        good = {row.id: (row, value) for row, value in rows if not isinstance(value, Skip)}
        same = self._same([row for row, _ in rows])
        points = [
            m.PointStruct(id=_id(id), vector=good[id][1].tolist(), payload={**_own(payload), "space": space})
            for id, payload in same.items() if id in good
        ]  # fmt: skip
        if points:
            self._do("upsert", self._of(space), points)
            self._mark(
                [good[str(point.id)][0] for point in points], {f"ratchet_{space}": 1, SKIPPED: None, RETRY: None}
            )
        for row, skip in rows:
            if isinstance(skip, Skip):
                retry = time.time() + RETRY_SECONDS if skip.transient else None
                self._mark([row], {SKIPPED: skip.reason, RETRY: retry})
        return len(same)

    def counts(self, space: str) -> Counts:
        there, here = self._ids(self._of(space)), self._ids(self._source)
        if gone := there - here:
            self._do("delete", self._of(space), [*gone])
        image, reason = _is_empty(self._image), _is_empty(SKIPPED)
        filters = [_is_empty(f"ratchet_{space}"), image], [image], [reason], [_is_empty(RETRY)]
        return Counts(*(self._do("count", self._source, m.Filter(must_not=each)).count for each in filters))

    def build(self, space: str) -> None:
        """Qdrant makes its index by itself; wait until it has."""
        while self._do("get_collection", self._of(space)).status == m.CollectionStatus.YELLOW:
            time.sleep(BUILD_SECONDS)

    def sample(self, space: str, count: int) -> Sequence[Vector]:
        drawn = m.SampleQuery(sample=m.Sample.RANDOM)
        points = self._do("query_points", self._of(space), drawn, limit=count, with_vectors=True).points
        return [np.array(point.vector, np.float32) for point in points]

    def search(self, space: str, vector: Vector, count: int, exact: bool) -> Sequence[float]:
        how = m.SearchParams(exact=exact)
        found = self._do("query_points", self._of(space), vector.tolist(), limit=count, search_params=how)
        return [point.score for point in found.points]

    def point(self, space: str) -> None:
        create = m.CreateAlias(collection_name=self._of(space), alias_name=self._name)
        steps: list[Any] = [m.CreateAliasOperation(create_alias=create)]
        if any(alias.alias_name == self._name for alias in self._do("get_aliases").aliases):
            steps.insert(0, m.DeleteAliasOperation(delete_alias=m.DeleteAlias(alias_name=self._name)))
        self._do("update_collection_aliases", steps)

    def drop(self, space: str) -> None:
        self._do("delete_collection", self._of(space))
        self._do("delete_payload", self._source, [f"ratchet_{space}"], m.Filter())

    def close(self) -> None:
        with self._lock:
            self._client.close()

    def _of(self, space: str) -> str:
        return f"{self._source}_{space}"

    def _same(self, rows: Sequence[PendingRow]) -> dict[str, dict[str, Any]]:
        """Payloads of the points whose image is still the same, by ID."""
        found = self._do("retrieve", self._source, [_id(row.id) for row in rows], with_payload=True)
        payloads = {str(point.id): point.payload or {} for point in found}
        return {
            row.id: payloads[row.id] for row in rows if str(payloads.get(row.id, {}).get(self._image)) == row.version
        }

    def _mark(self, rows: Sequence[PendingRow], payload: dict[str, Any]) -> None:
        """Set payload where the image is still the same: Qdrant compares it, so that no upsert is missed."""
        where = [
            m.Filter(must=[
                m.HasIdCondition(has_id=[_id(row.id)]),
                m.FieldCondition(key=self._image, match=m.MatchValue(value=row.version)),
            ])
            for row in rows
        ]  # fmt: skip
        everywhere = m.HasIdCondition(has_id=[_id(row.id) for row in rows])
        self._do("set_payload", self._source, payload, m.Filter(must=[everywhere], should=where))

    def _ids(self, collection: str) -> set[Any]:
        found, start = set[Any](), None
        while True:
            points, start = self._do("scroll", collection, limit=10_000, offset=start, with_payload=False)
            found.update(point.id for point in points)
            if start is None:
                return found

    def _do(self, method: str, *arguments: Any, **options: Any) -> Any:
        try:
            with self._lock:
                return getattr(self._client, method)(*arguments, **options)
        except Exception as error:  # httpx's and qdrant-client's own; local mode raises ValueError
            words = f"{type(error).__name__}: {str(error).strip()[:200]}"
            raise StoreUnavailable(f"Qdrant of index {self._name}: {words}", "The worker tries again.") from None


def _is_empty(key: str) -> m.IsEmptyCondition:
    return m.IsEmptyCondition(is_empty=m.PayloadField(key=key))


def _own(payload: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in payload.items() if not key.startswith("ratchet_")}


def _id(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
