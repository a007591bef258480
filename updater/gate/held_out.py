"""Held-out samples of the sample store: their words at once, their images when one is asked for.

An update may have a hundred thousand of them, of which the gate asks some thousands: which ones follows from ids,
domains and texts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any, Protocol

import pyarrow as pa

from core.errors import GateError, StoreError
from streams.store.rows import SAMPLE_SCHEMA
from streams.store.sample_store import ADDRESS, Having, SampleStore

WORDS_ROWS = 1024
"""Rows whose words are read at once."""
TEXT_COLUMNS = ("id", "text", "question", "answer", "domain", "concept")
PAGE = 16
"""Images that are read at once."""
PAGES = 8
"""Pages that are kept, for as many threads: of images of 8 MiB, the largest that are ingested, 1 GiB."""


class Images(Protocol):
    """Encoded images by sample id."""

    def expect(self, ids: Sequence[str]) -> None:
        """These will be asked for, in this order: neighbours may be read together."""

    def __call__(self, sample: str) -> bytes:
        """One of them. Raises GateError."""


class TableImages:
    """Those of a table with the columns id and image."""

    def __init__(self, rows: pa.Table) -> None:
        self._rows = dict(zip(rows["id"].to_pylist(), rows["image"], strict=True))

    def expect(self, ids: Sequence[str]) -> None:
        """Nothing to do: all are here."""

    def __call__(self, sample: str) -> bytes:
        image: bytes = self._rows[sample].as_py()
        return image


class HeldOut:
    """The split ``fresh_eval`` of one version of the store; also gives the images of the rows that were read. For
    several threads.

    Args:
        version: one that is pinned, or that is kept for as long as the images are asked for.
        having: only samples that have a text, or a question; None: all.
    """

    def __init__(self, store: SampleStore, version: int, having: Having | None) -> None:
        self.store, self.version, self.having = store, version, having
        self._addresses: dict[str, int] = {}
        self._pages: list[list[str]] = []
        self._page_of: dict[str, int] = {}
        self._cached_pages: OrderedDict[int, dict[str, bytes]] = OrderedDict()
        self._lock = Lock()

    def rows(self, columns: Sequence[str], after: Mapping[str, int] | None = None) -> pa.Table:
        """All rows, or those at or after some offsets, in no order. ``columns``: id, and others than the image."""
        schema = pa.schema([SAMPLE_SCHEMA.field(name) for name in columns])
        parts = [schema.empty_table()]
        for batch in self.store.addresses(columns, self.version, "fresh_eval", self.having, after):
            self._addresses.update(zip(batch["id"].to_pylist(), batch[ADDRESS].to_pylist(), strict=True))
            parts.append(pa.Table.from_batches([batch.select(list(columns))]))
        return pa.concat_tables(parts)

    def some(self, ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """Other columns of rows that :meth:`rows` has given, in the order of ``ids``."""
        rows: list[dict[str, Any]] = []
        for start in range(0, len(ids), WORDS_ROWS):
            addresses = [self._addresses[each] for each in ids[start : start + WORDS_ROWS]]
            rows += self.store.rows_at(addresses, columns, self.version)
        return pa.Table.from_pylist(rows, pa.schema([SAMPLE_SCHEMA.field(name) for name in columns]))

    def expect(self, ids: Sequence[str]) -> None:
        """Read neighbours in ``ids`` together, but for those that were expected before."""
        new = [each for each in dict.fromkeys(ids) if each not in self._page_of]
        for start in range(0, len(new), PAGE):
            page = new[start : start + PAGE]
            self._page_of.update(dict.fromkeys(page, len(self._pages)))
            self._pages.append(page)

    def __call__(self, sample: str) -> bytes:
        """The image of a row that :meth:`rows` has given. Raises GateError when the store cannot be read."""
        if sample not in self._page_of:
            self.expect([sample])
        number = self._page_of[sample]
        with self._lock:
            if number not in self._cached_pages:
                self._cached_pages[number] = self._read(self._pages[number])
            self._cached_pages.move_to_end(number)
            while len(self._cached_pages) > PAGES:
                self._cached_pages.popitem(last=False)
            return self._cached_pages[number][sample]

    def _read(self, page: Sequence[str]) -> dict[str, bytes]:
        try:
            rows = self.store.rows_at([self._addresses[each] for each in page], ["image"], self.version)
        except StoreError as error:
            raise GateError(f"images of held-out samples cannot be read: {error.message}", error.fix) from error
        return {each: row["image"] for each, row in zip(page, rows, strict=True)}
