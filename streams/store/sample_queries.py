"""Questions about what is stored: samples by filter, and counts by domain, source and concept.

Whole scans of the columns that are asked about, in bounded memory: for people, not for the path of a record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from streams.store.receipts import id_condition
from streams.store.rows import SAMPLE_COLUMNS, Split, Tally, moment, quoted, refused
from streams.store.sample_store import SampleStore

LIST_COLUMNS: Final = (
    "id", "split", "domain", "source", "concept", "label", "text", "question", "answer", "width", "height", "time",
)  # fmt: skip
IMAGE_ROWS: Final = 16
"""Rows of a batch that holds images: at 8 MiB each 128 MiB."""
OTHERS: Final = "(others)"
MAX_VALUES: Final = 50_000
"""Values that are counted beside each other; of more, those seen least are left out."""


@dataclass(frozen=True, slots=True)
class SampleFilter:
    """Which samples. None: any."""

    split: Split | None = None
    domain: str | None = None
    source: str | None = None
    concept: str | None = None
    text: str | None = None
    """What text, question or answer contains, in upper or lower case."""
    since: datetime | None = None
    """Stored at or after this time."""

    def where(self) -> str:
        """As a condition on rows."""
        clauses = ["kind = 'sample'"]
        for name in ("split", "domain", "source", "concept"):
            value = getattr(self, name)
            if value is not None:
                clauses.append(f"{name} = {quoted(value)}")
        if self.text is not None:
            words = f"lower({quoted(self.text)})"
            fields = " OR ".join(f"contains(lower({name}), {words})" for name in ("text", "question", "answer"))
            clauses.append(f"({fields})")
        if self.since is not None:
            clauses.append(f"ingested_at >= {moment(self.since)}")
        return " AND ".join(clauses)

    @property
    def is_empty(self) -> bool:
        """Whether it lets every sample pass."""
        return self == SampleFilter()


def newest_samples(
    store: SampleStore, which: SampleFilter, limit: int, columns: Sequence[str] = LIST_COLUMNS
) -> list[dict[str, Any]]:
    """The samples that were stored last, newest first. Raises StoreUnavailable."""
    return store.newest(limit, which.where(), columns)


def with_images(store: SampleStore, rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each row with its image, read a few at a time; those that are gone meanwhile are passed over."""
    for start in range(0, len(rows), IMAGE_ROWS):
        group = rows[start : start + IMAGE_ROWS]
        images = store.image([row["id"] for row in group])
        for row in group:
            if row["id"] in images:
                yield {**row, "image": images[row["id"]]}


def find_samples(store: SampleStore, sample_id: str, limit: int = 10) -> list[dict[str, Any]]:
    """Samples, with their images, whose id is or begins with ``sample_id``. Raises RecordError, StoreUnavailable."""
    return store.select(f"kind = 'sample' AND {id_condition(sample_id)}", SAMPLE_COLUMNS, limit)


def stream_samples(store: SampleStore, which: SampleFilter, version: int | None = None) -> Iterator[dict[str, Any]]:
    """All samples that pass, with their images, one after another in the order in which they are stored."""
    for batch in store.batches(which.where(), SAMPLE_COLUMNS, IMAGE_ROWS, version):
        for index in range(batch.num_rows):  # one image as a Python object at a time
            yield {name: batch.column(name)[index].as_py() for name in SAMPLE_COLUMNS}


def count_samples(store: SampleStore, which: SampleFilter, version: int | None = None) -> int:
    """How many pass; known without a scan where all do."""
    if which.is_empty:
        return store.count(version)
    return sum(batch.num_rows for batch in store.batches(which.where(), ["offset"], version=version))


@dataclass
class ValueCounts:
    """How often each value of a column is there, the rarest left out where there are too many to count."""

    counts: Counter[str] = field(default_factory=Counter)
    omitted: int = 0
    """Rows of values that were left out. A value may have rows here that were counted before it was left out."""

    def add(self, values: pa.Array) -> None:
        """Count a column of a batch; null as empty."""
        for each in pc.value_counts(values):
            self.counts[each["values"].as_py() or ""] += each["counts"].as_py()
        if len(self.counts) > MAX_VALUES:
            most_common = Counter(dict(self.counts.most_common(MAX_VALUES // 2)))
            self.omitted += self.counts.total() - most_common.total()
            self.counts = most_common

    def top(self, limit: int) -> list[tuple[str, int]]:
        """The most frequent values; the others are summed up as the last."""
        rows = self.counts.most_common(limit)
        others = self.counts.total() + self.omitted - sum(count for _, count in rows)
        return [*rows, (OTHERS, others)] if others else rows


@dataclass
class StoreStats:
    """What the store holds."""

    version: int
    tally: Tally
    size: int
    """Bytes of the data files, with what is not compacted away yet."""
    samples: dict[str, ValueCounts]
    """Samples by ``domain``, ``source`` and ``concept``."""
    refusals: dict[str, ValueCounts]
    """Refused records by ``reason`` and ``source``."""


def store_stats(store: SampleStore) -> StoreStats:
    """Count; kinds, splits and bytes come from the tally. Raises StoreUnavailable."""
    version = store.version()
    samples = count_values(store, "kind = 'sample'", ("domain", "source", "concept"), version)
    return StoreStats(version, store.tally(version), store.size(), samples, refusal_counts(store, version=version))


def refusal_counts(
    store: SampleStore, reason: str | None = None, source: str | None = None, version: int | None = None
) -> dict[str, ValueCounts]:
    """Refused records by ``reason`` and by ``source``; only those of one reason, or of one source."""
    return count_values(store, refused(reason, source), ("reason", "source"), version)


def count_values(
    store: SampleStore, where: str, columns: Sequence[str], version: int | None = None
) -> dict[str, ValueCounts]:
    """How often each value of the columns is there."""
    counts = {name: ValueCounts() for name in columns}
    for batch in store.batches(where, columns, version=version):
        for name, values in counts.items():
            values.add(batch.column(name))
    return counts
