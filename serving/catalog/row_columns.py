"""Rows of a catalog table as arrays by index position: ID digests, unit vectors, and the fields of hits and filters.
Sample IDs are SHA-256 digests in 64 hexadecimal digits; a key is the first 64 bits."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from core.errors import StoreError
from serving.catalog.queries import Filters, Hit

Digests = npt.NDArray[np.uint8]
"""uint8 [n, 32]."""
Keys = npt.NDArray[np.uint64]
"""First 64 bits of digests; among a million samples two are equal with a probability of 3e-8."""
DIGITS: Final = 64
Vectors = npt.NDArray[np.float32]
BATCH_ROWS: Final = 4096
Positions = npt.NDArray[np.int64]
GROWTH: Final = 1.25
LEAST_LENGTH: Final = 1024
MOST_TEXT_BYTES: Final = 1024
"""Longer texts are not kept here but read from the table with each hit."""
PENDING_ROWS: Final = 65_536
ROW_BYTES: Final = 32 + 1 + 8 + (8 + 4) + 5 * 4 + 2 * 8
"""Digest, liveness, time, text position, dictionary codes, and key position."""
LABELS: Final = ["concept", "label", "tags"]
"""Columns that only filters need. Tables of earlier versions lack them until :meth:`Tables.upgrade`."""
TAG_SEPARATOR: Final = ";"
"""No tag contains it: see :mod:`ratchet_client.records`."""
NO_TIME: Final = np.iinfo(np.int64).min
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_Scalar = TypeVar("_Scalar", bound=np.generic)


def digests_of(ids: list[str] | pa.Array | pa.ChunkedArray) -> Digests:
    """Digests [n, 32] of IDs. Raises StoreError for an ID that is not a digest."""
    names = ids if isinstance(ids, list) else ids.to_pylist()
    try:
        data = bytes.fromhex("".join(names))
    except (TypeError, ValueError):
        data = b""
    if len(data) != len(names) * DIGITS // 2 or any(len(name) != DIGITS for name in names):
        raise StoreError("an id in the catalog is not a SHA-256 digest.", "Report this.")
    return np.frombuffer(data, np.uint8).reshape(-1, DIGITS // 2)


def keys_of(digests: Digests) -> Keys:
    return np.ascontiguousarray(digests[:, :8]).view(">u8").reshape(-1).astype(np.uint64)


def unit_rows(vectors: Vectors) -> Vectors:
    """Vectors [n, dim] of unit length; zeros for those without a direction."""
    vectors = np.asarray(vectors, np.float32)
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return np.ascontiguousarray(np.nan_to_num(unit, posinf=0.0, neginf=0.0), np.float32)


def vectors_of(rows: pa.RecordBatch | pa.Table) -> Vectors:
    column = rows.column("vector")
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, np.float32).reshape(rows.num_rows, -1)


class RowColumns:
    """Digest, time, text, and dictionary-encoded fields by position, without Python objects per row. One writer at a
    time. 89 bytes a row plus its text. Positions are never reused; that of a removed row stays empty."""

    def __init__(self) -> None:
        self.end = 0
        """All positions are below this one."""
        self.rows = 0
        """Number of positions that hold a row."""
        self._digests: Digests = np.zeros((LEAST_LENGTH, 32), np.uint8)
        self._live = np.zeros(LEAST_LENGTH, np.bool_)
        self._times = np.zeros(LEAST_LENGTH, np.int64)
        self._domains, self._sources = _Dictionary(), _Dictionary()
        self._concepts, self._labels, self._tags = _Dictionary(), _Dictionary(), _TagDictionary()
        self._text_starts = np.zeros(LEAST_LENGTH, np.int64)
        self._text_sizes = np.zeros(LEAST_LENGTH, np.int32)
        self._texts = np.zeros(LEAST_LENGTH, np.uint8)
        self._text_end = 0
        self._places = _KeyPlaces()

    @property
    def bytes(self) -> int:
        """Memory in bytes, without the arrays' spare capacity."""
        encoded = (self._domains, self._sources, self._concepts, self._labels, self._tags)
        return self.end * ROW_BYTES + self._text_end + sum(each.value_bytes for each in encoded)

    def live(self) -> npt.NDArray[np.bool_]:
        """True for positions that hold a row. A view."""
        return self._live[: self.end]

    def digests(self) -> Digests:
        """By position; zeros for empty ones. A view."""
        return self._digests[: self.end]

    def positions(self, keys: Keys) -> Positions:
        """Positions of the rows with these keys; -1 for unknown keys."""
        positions = self._places.find(keys)
        here = positions >= 0
        positions[here] = np.where(self._live[positions[here]], positions[here], -1)
        return positions

    def allocate(self, count: int) -> Positions:
        first, self.end = self.end, self.end + count
        for name in ("_digests", "_live", "_times", "_text_starts", "_text_sizes"):
            setattr(self, name, grown(getattr(self, name), self.end))
        return np.arange(first, self.end, dtype=np.int64)

    def write(self, positions: Positions, rows: pa.RecordBatch | pa.Table) -> None:
        """Write rows (id, domain, source, time, text, concept, label, tags) to allocated, empty positions."""
        digests = digests_of(rows.column("id"))
        self._digests[positions] = digests
        times = rows.column("time").cast(pa.timestamp("us", "UTC")).cast(pa.int64())
        self._times[positions] = np.asarray(times.fill_null(NO_TIME).to_numpy(zero_copy_only=False), np.int64)
        self._domains.write(positions, self.end, rows.column("domain"))
        self._sources.write(positions, self.end, rows.column("source"))
        self._concepts.write(positions, self.end, rows.column("concept"))
        self._labels.write(positions, self.end, rows.column("label"))
        self._tags.write(positions, self.end, pc.binary_join(rows.column("tags"), TAG_SEPARATOR))
        self._write_texts(positions, rows.column("text"))
        self._live[positions] = True
        self.rows += len(positions)
        self._places.add(keys_of(digests), positions, self.live(), self.digests())

    def remove(self, positions: Positions) -> None:
        for start, size in zip(self._text_starts[positions], self._text_sizes[positions], strict=True):
            self._texts[start : start + max(0, size)] = 0
        self._live[positions] = False
        self._digests[positions] = 0
        self._times[positions] = NO_TIME
        self._text_sizes[positions] = 0
        self.rows -= len(positions)

    def matching(self, filters: Filters) -> npt.NDArray[np.bool_]:
        """True for positions whose row meets the conditions."""
        mask = self.live().copy()
        for column, values in (
            (self._domains, filters.domain), (self._sources, filters.source), (self._concepts, filters.concepts),
            (self._labels, filters.labels), (self._tags, filters.tags),
        ):  # fmt: skip
            if values:
                mask &= column.among(values, self.end)
        if filters.since is not None or filters.until is not None:
            times = self._times[: self.end]
            mask &= times != NO_TIME
            if filters.since is not None:
                mask &= times >= _microseconds(filters.since)
            if filters.until is not None:
                mask &= times < _microseconds(filters.until)
        return mask

    def hits(self, positions: list[int], scores: list[float]) -> tuple[list[Hit], list[str]]:
        """Hits at some positions, and the IDs whose long text is only in the table."""
        digests = self._digests[positions].tobytes().hex()
        ids = [digests[start : start + DIGITS] for start in range(0, len(digests), DIGITS)]
        times, sizes = self._times[positions].tolist(), self._text_sizes[positions].tolist()
        hits = [
            Hit(name, score, self._text(start, size), domain, source, _moment(time))
            for name, score, start, size, domain, source, time in zip(
                ids, scores, self._text_starts[positions].tolist(), sizes, self._domains.values(positions),
                self._sources.values(positions), times, strict=True,
            )
        ]  # fmt: skip
        return hits, [name for name, size in zip(ids, sizes, strict=True) if size < 0]

    def _text(self, start: int, size: int) -> str:
        return self._texts[start : start + size].tobytes().decode() if size > 0 else ""

    def _write_texts(self, positions: Positions, column: Any) -> None:
        parts = [text.encode() for text in column.fill_null("").to_pylist()]
        sizes = np.asarray([len(part) for part in parts], np.int64)
        short = sizes <= MOST_TEXT_BYTES
        data = b"".join(part for part, is_short in zip(parts, short, strict=True) if is_short)
        self._texts = grown(self._texts, self._text_end + len(data))
        self._texts[self._text_end : self._text_end + len(data)] = np.frombuffer(data, np.uint8)
        lengths = np.where(short, sizes, 0)
        self._text_starts[positions] = self._text_end + np.cumsum(lengths) - lengths
        self._text_sizes[positions] = np.where(short, sizes, -1)
        self._text_end += len(data)


class _Dictionary:
    """A dictionary-encoded text column."""

    def __init__(self) -> None:
        self._codes = np.zeros(LEAST_LENGTH, np.int32)
        self._values: list[str] = []
        self._numbers: dict[str, int] = {}
        self.value_bytes = 0

    def write(self, positions: Positions, end: int, column: Any) -> None:
        encoded = (column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column).fill_null("")
        encoded = encoded.dictionary_encode()
        numbers = np.asarray([self._number(value) for value in encoded.dictionary.to_pylist()], np.int32)
        self._codes = grown(self._codes, end)
        self._codes[positions] = numbers[encoded.indices.to_numpy(zero_copy_only=False)]

    def values(self, positions: list[int]) -> list[str]:
        return [self._values[code] for code in self._codes[positions].tolist()]

    def among(self, values: tuple[str, ...], end: int) -> npt.NDArray[np.bool_]:
        numbers = self._numbers_of(values)
        codes = self._codes[:end]
        return codes == numbers[0] if len(numbers) == 1 else np.isin(codes, np.asarray(numbers, np.int32))

    def _numbers_of(self, values: tuple[str, ...]) -> list[int]:
        return [self._numbers[value] for value in values if value in self._numbers]

    def _number(self, value: str) -> int:
        number = self._numbers.get(value)
        if number is None:
            number = self._numbers[value] = len(self._values)
            self._values.append(value)
            self.value_bytes += 200 + len(value)  # of list, dictionary and string
        return number


class _TagDictionary(_Dictionary):
    """A column of joined tags: a row has one of the values if it is among its tags."""

    def _numbers_of(self, values: tuple[str, ...]) -> list[int]:
        wanted = set(values)
        return [number for joined, number in self._numbers.items() if wanted & set(joined.split(TAG_SEPARATOR))]


class _KeyPlaces:
    """Maps keys to positions: sorted arrays, and a dictionary of later additions."""

    def __init__(self) -> None:
        self._sorted: Keys = np.empty(0, np.uint64)
        self._where: Positions = np.empty(0, np.int64)
        self._pending: dict[int, int] = {}

    def find(self, keys: Keys) -> Positions:
        positions = np.full(len(keys), -1, np.int64)
        if len(self._sorted):
            index = np.minimum(np.searchsorted(self._sorted, keys), len(self._sorted) - 1)
            equal = self._sorted[index] == keys
            positions[equal] = self._where[index[equal]]
        if self._pending:
            for number, key in enumerate(keys.tolist()):
                positions[number] = self._pending.get(key, positions[number])
        return positions

    def add(self, keys: Keys, positions: Positions, live: npt.NDArray[np.bool_], digests: Digests) -> None:
        self._pending.update(zip(keys.tolist(), positions.tolist(), strict=True))
        if len(self._pending) >= PENDING_ROWS:
            self._where = np.flatnonzero(live).astype(np.int64)
            every = keys_of(digests[self._where])
            order = np.argsort(every)
            self._sorted, self._where = every[order], self._where[order]
            self._pending.clear()


def grown(array: npt.NDArray[_Scalar], end: int) -> npt.NDArray[_Scalar]:
    """The array, or a longer zero-padded copy with at least ``end`` entries."""
    if end <= len(array):
        return array
    longer = np.zeros((int(end * GROWTH), *array.shape[1:]), array.dtype)
    longer[: len(array)] = array
    return longer


def _moment(microseconds: int) -> datetime | None:
    return None if microseconds == NO_TIME else EPOCH + timedelta(microseconds=microseconds)


def _microseconds(moment: datetime) -> int:
    return (moment - EPOCH) // timedelta(microseconds=1)
