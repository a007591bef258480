"""Sources of the console's data: ledger, artifacts, sample store, and the server over HTTP."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import pyarrow as pa
from PIL import Image

from core.access import Access
from core.artifacts import Artifacts
from core.errors import RatchetError, RecordError, StoreUnavailable
from core.ledger import Family, Ledger
from core.settings import Settings
from ops.stream_state import StreamState, stream_state
from ratchet_client import Client, ServerError
from ratchet_client.images import decode_image
from serving.engines.clip_base import names_by_digest
from serving.own_threads import BoundedCall
from streams.store.sample_store import SampleStore
from updater.service.learning_state import LearningState, learning_states

Result = TypeVar("Result")
STATUS_SECONDS = 2.0
"""Minimum interval between queries for data that many viewers poll."""
STREAM_SECONDS = 5.0
"""The same for the stream, which scans the store for gaps, and for the gate's items."""
PATIENCE_SECONDS = 5.0
"""Longest wait of a page for the store and the server before it shows what it can without."""
ACTION_SECONDS = 900.0
"""A release of a new adapter waits for its catalog."""
KEPT_PICTURES = 600
EXAMPLES = 12
EXAMPLE_ROWS = 20_000
"""Larger stores are not searched for examples; the newest samples of each partition are used."""


class ConsoleData:
    """Data for all pages. Thread safe; connects on first use."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = SampleStore(settings.lake)
        self._stream = BoundedCall(lambda: stream_state(settings, self.store, self.ledger), PATIENCE_SECONDS)
        self._thumbnails = lru_cache(KEPT_PICTURES)(self._thumbnail)
        self._cache: dict[str, tuple[float, Any]] = {}
        self._lock = threading.Lock()
        self._turns: dict[str, threading.Lock] = {}

    @cached_property
    def ledger(self) -> Ledger:
        """The ledger. Raises LedgerError while it is unavailable; the next request tries again."""
        return Ledger.open(self.settings.ledger)

    @cached_property
    def access(self) -> Access:
        return Access(self.ledger, self.settings)

    @cached_property
    def artifacts(self) -> Artifacts:
        return Artifacts(self.settings.artifacts)

    def client(self, key: str, timeout: float = 60.0) -> Client:
        """A client with ``key``; an empty key is anonymous."""
        own = key == self.settings.operator_key().get_secret_value()
        actor = "operator" if own else "console"  # the server prefixes a key's name: key:ana/console
        return Client(self.settings.server, key, actor=actor, timeout=timeout, retries=0)

    def status(self, *, fresh: bool = False) -> dict[str, Any] | None:
        """State of controller and catalog; None if the server does not answer. ``fresh``: bypass the cache."""
        return self.cached("status", self._status, seconds=0.0 if fresh else STATUS_SECONDS)

    def resident_releases(self, *, fresh: bool = False) -> dict[int, dict[str, Any]]:
        """Resident releases by number; empty if the server does not answer."""
        status = self.status(fresh=fresh)
        rows = [] if status is None else status["controller"]["resident"]
        return {row["release"]: row for row in rows}

    def cached(self, name: str, make: Callable[[], Result], seconds: float = STATUS_SECONDS) -> Result:
        """The result of ``make``, at most ``seconds`` old. Concurrent callers wait for one result."""
        with self._lock:
            turn = self._turns.setdefault(name, threading.Lock())
        with turn:
            since, value = self._cache.get(name, (float("-inf"), None))
            if time.monotonic() - since > seconds:
                value = make()
                self._cache[name] = (time.monotonic(), value)
            result: Result = value
            return result

    def invalidate(self) -> None:
        for name in ("status", "overview"):
            self._cache.pop(name, None)

    def _status(self) -> dict[str, Any] | None:
        key = self.settings.operator_key().get_secret_value()
        try:
            with self.client(key, timeout=PATIENCE_SECONDS) as client:
                return client.status()
        except ServerError:
            return None

    def report(self, update_id: str, name: str) -> bytes:
        """A file of a gate report. Raises AdapterError when it is missing."""
        return self.artifacts.read_bytes(f"reports/{update_id}/{name}")

    def report_data(self, update_id: str) -> dict[str, Any] | None:
        """A gate report as data; None if it is missing or damaged."""
        with suppress(RatchetError, OSError, ValueError):
            found = json.loads(self.report(update_id, "report.json"))
            return found if isinstance(found, dict) else None
        return None

    def samples(self, ids: Collection[str]) -> dict[str, dict[str, Any]]:
        if not ids:
            return {}
        rows = self.store.scan(ids=sorted(ids), columns=["id", "text", "question", "answer"])
        return {row["id"]: row for row in rows.to_pylist()}

    def picture(self, sample_id: str) -> bytes | None:
        return self.store.image([sample_id]).get(sample_id)

    def thumbnail(self, sample_id: str, size: int) -> bytes | None:
        """A sample's picture as PNG, re-encoded so that no producer's bytes reach a browser."""
        # The number of deletions is part of the key, so that deleted pictures are not served from the cache.
        deleted = self.cached("deleted", lambda: self.store.tally()["deleted"], STATUS_SECONDS)
        return self._thumbnails(sample_id, size, deleted)

    def _thumbnail(self, sample_id: str, size: int, _deleted: int) -> bytes | None:
        data = self.picture(sample_id)
        return None if data is None else self.draw(data, size)

    def draw(self, data: bytes, size: int, *, enlarge: bool = False) -> bytes | None:
        """An untrusted image as PNG of at most ``size`` pixels a side; None if it does not decode. ``enlarge``: a small
        one by a whole factor, so that its pixels stay sharp."""
        ingest = self.settings.ingest
        try:
            image = decode_image(data, max_pixels=ingest.max_pixels, max_bytes=ingest.max_image_bytes)
        except RecordError:
            return None
        image.thumbnail((size, size))
        if enlarge and (factor := size // max(image.size)) > 1:
            image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    def examples(self) -> list[dict[str, Any]]:
        """Samples to play with, spread over the store, including the newest data."""
        return self.cached("examples", self._examples, seconds=30.0)

    def _examples(self) -> list[dict[str, Any]]:
        many = self.store.count() > EXAMPLE_ROWS
        after = {place: next_ - EXAMPLE_ROWS // 20 for place, next_ in self.store.offsets().items()} if many else None
        rows = self.store.scan(columns=["id", "text", "question", "answer", "domain"], after=after)
        total = rows.num_rows
        places = sorted({int((index + 0.5) * total / EXAMPLES) for index in range(EXAMPLES)}) if total else []
        found: list[dict[str, Any]] = rows.take(pa.array(places, pa.int64())).to_pylist()
        return found

    def stream(self) -> StreamState:
        """The state of the stream. Raises StoreUnavailable, also when the store does not answer in time."""
        try:
            return self.cached("stream", self._stream, STREAM_SECONDS)
        except TimeoutError as error:
            message = f"the sample store {self.store.url} does not answer: {error}."
            raise StoreUnavailable(message, state="slow") from None

    def learning(self) -> dict[Family, LearningState]:
        return self.cached("learning", lambda: learning_states(self.settings, self.ledger, self.store), STREAM_SECONDS)

    def base_names(self) -> dict[str, str]:
        return self.cached("bases", lambda: names_by_digest(self.settings.home), seconds=60.0)


def short_texts(rows: Sequence[dict[str, Any]], column: str = "text", most: int = 5, chars: int = 40) -> list[str]:
    """Distinct short texts of samples, as suggestions for searches and questions."""
    texts = dict.fromkeys(row[column].strip() for row in rows if 3 <= len(row[column].strip()) <= chars)
    return list(texts)[:most]
