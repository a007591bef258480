"""The sample store's reading side: one Lance table with the samples and the topic positions that match them.
:mod:`streams.store.writer` commits to it, :mod:`streams.store.maintenance` keeps it compact.

>>> store = SampleStore(settings.lake)
>>> store.count(split="train")
>>> fresh = store.scan(split="train", after=update.data_to, columns=["id", "text"])
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, Literal

import pyarrow as pa
import pyarrow.compute as pc

from core.errors import StoreError
from streams.store.conditions import IDS_PER_QUERY, at_offset, is_in, moment, quarantine_condition, quoted
from streams.store.rows import (
    ACCEPTED,
    ROOT,
    SAMPLE_COLUMNS,
    SCHEMA,
    SPLITS,
    Position,
    SampleTable,
    Tally,
    chunks,
    outage,
    position_fragments,
    positions,
    reading_store,
)
from streams.store.writer import Rows, StoreWriter

Having = Literal["text", "question"]
BATCH_ROWS: Final = 8192
BACKUP_PIN: Final = "backup-"
IO_BUFFER_BYTES: Final = 64 << 20
"""Read-ahead of a scan; Lance's default is 2 GiB."""
ADDRESS: Final = "_rowaddr"
"""Lance's row address: the fragment, and the row's place in it, in one number."""
_ID = re.compile(r"[0-9a-f]{64}")
_ORDER = ("topic", "partition", "offset")
_QUARANTINED = [*_ORDER, "reason", "detail", "source", "ingested_at", "original", "original_key", "original_headers"]


class SampleStore:
    """Samples at ``<lake url>/samples.lance``. Without a table: version 0 and no rows. Reading methods take ``version``
    (default: the latest). A version's results never change while it is kept: until maintenance removes it, or as long
    as it is pinned."""

    def __init__(self, lake: str) -> None:
        self.lake = lake
        self.table = SampleTable(lake)
        self.url = self.table.url

    def __reduce__(self) -> tuple[type[SampleStore], tuple[str]]:
        return SampleStore, (self.lake,)

    # -- versions and positions -------------------------------------------------------------------------------------

    def version(self) -> int:
        dataset = self.table.open()
        return 0 if dataset is None else int(dataset.version)

    def pin(self, name: str, version: int) -> None:
        """Keep a version until :meth:`unpin`. Pinning another version under the same name moves the pin. Raises
        StoreUnavailable, or StoreError if the version is no longer kept."""
        dataset = self.table.open()
        if dataset is None or not version:
            return
        try:
            known = dataset.tags.list()
            (dataset.tags.update if name in known else dataset.tags.create)(name, version)
        except (ValueError, OSError) as error:
            self.table.open(version)  # raises if it is no longer kept
            raise outage(self.url, "written", error) from error

    def unpin(self, name: str) -> None:
        """Remove a pin; unknown names are ignored."""
        dataset = self.table.open()
        if dataset is not None and name in dataset.tags.list():
            dataset.tags.delete(name)

    def pins(self) -> dict[str, int]:
        dataset = self.table.open()
        return {} if dataset is None else {name: int(tag["version"]) for name, tag in dataset.tags.list().items()}

    def versions(self) -> list[int]:
        dataset = self.table.open()
        return [] if dataset is None else [int(each["version"]) for each in dataset.versions()]

    def positions(self, version: int | None = None) -> dict[str, Position]:
        """Reading progress by partition key. Its cost does not depend on the number of rows."""
        dataset = self.table.open(version)
        known = [] if dataset is None else [position for _, position in positions(dataset)]
        return {position.key: position for position in known if position.key != ROOT.key}

    def offsets(self, version: int | None = None) -> dict[str, int]:
        return {key: position.next for key, position in self.positions(version).items()}

    def reached(self, version: int | None = None) -> dict[str, int]:
        """:meth:`offsets`, with the version itself as :data:`~streams.store.rows.ACCEPTED` if samples were accepted."""
        version = self.version() if version is None else version
        accepted = {ACCEPTED: version} if self.tally(version)["accepted"] else {}
        return {**self.offsets(version), **accepted}

    def tally(self, version: int | None = None) -> Tally:
        """Rows by kind and split, kept with the positions instead of counted. See :data:`streams.store.rows.Tally`."""
        dataset = self.table.open(version)
        total: Tally = Counter()
        for _, position in [] if dataset is None else positions(dataset):
            total.update(position.tally)  # update, not +: deletions leave negative counts
        return total

    # -- samples ----------------------------------------------------------------------------------------------------

    def count(
        self,
        version: int | None = None,
        split: str | None = None,
        after: Mapping[str, int] | None = None,
        having: Having | None = None,
        without: Collection[str] = (),
    ) -> int:
        """Number of samples: in a split, at or after the given offsets, with a text or a question, not of the sources
        ``without``. Needs no scan without ``after`` and ``without``; with ``after``, only what may be after the offsets
        is read."""
        if after or without:
            return self.count_rows(*self._where(version, split, after, having, without))
        tally = self.tally(version)
        splits = SPLITS if split is None else (split,)
        return sum(tally[name if having is None else f"{name}/{having}"] for name in splits)

    def scan(
        self,
        version: int | None = None,
        split: str | None = None,
        after: Mapping[str, int] | None = None,
        columns: Sequence[str] | None = None,
        ids: Sequence[str] | None = None,
        having: Having | None = None,
    ) -> pa.Table:
        """Samples in the order of (topic, partition, offset). ``after`` leaves out samples before these next offsets,
        as :meth:`reached` returns them; partitions not named are returned whole. ``columns``: of
        :data:`~streams.store.rows.SAMPLE_COLUMNS`; all by default, images included. ``ids``: only these; unknown ones
        are skipped. ``having``: only samples with a ``text`` (a CLIP learns from these) or a ``question`` (a VLM)."""
        wanted = list(SAMPLE_COLUMNS if columns is None else columns)
        if unknown := set(wanted) - set(SAMPLE_COLUMNS):
            raise StoreError(f"samples have no column {sorted(unknown)}.", f"Columns: {', '.join(SAMPLE_COLUMNS)}.")
        read = [*wanted, *(name for name in _ORDER if name not in wanted)]
        where, version = self._where(version, split, after, having)
        filters = [where] if ids is None else [f"({where}) AND {part}" for part in _id_filters(ids)]
        parts = [self._table(read, each, version) for each in filters or ["false"]]
        table = pa.concat_tables(parts)
        order = pc.sort_indices(table.select(_ORDER), sort_keys=[(name, "ascending") for name in _ORDER])
        return table.take(order).select(wanted)

    def addresses(
        self,
        columns: Sequence[str],
        version: int | None = None,
        split: str | None = None,
        having: Having | None = None,
        after: Mapping[str, int] | None = None,
        without: Collection[str] = (),
    ) -> Iterator[pa.RecordBatch]:
        """Batches of sample columns with their ``_rowaddr``, in file order; chosen as by :meth:`count`. Pass the
        addresses to :meth:`rows_at`, with the same version."""
        where, version = self._where(version, split, after, having, without)
        yield from self.batches(where, columns, version=version, addresses=True)

    def rows_at(
        self, addresses: Sequence[int], columns: Sequence[str], version: int | None = None
    ) -> list[dict[str, Any]]:
        """Rows of a version by address, in the given order, without a scan. Raises StoreError if one is missing."""
        if not len(addresses):
            return []
        where = is_in(ADDRESS, (str(int(each)) for each in addresses))
        table = self._table(columns, where, version, with_row_address=True)
        rows = {row.pop(ADDRESS): row for row in table.to_pylist()}
        if missing := {int(each) for each in addresses} - rows.keys():
            raise StoreError(
                f"version {version} of the sample store {self.url} lacks {len(missing)} rows that it had.",
                "Addresses are good for one version: ask for them again.",
            )
        return [rows[int(each)] for each in addresses]

    def image(self, ids: Sequence[str]) -> dict[str, bytes]:
        table = self.scan(ids=ids, columns=["id", "image"])
        return dict(zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True))

    def select(
        self, where: str, columns: Sequence[str], limit: int | None = None, version: int | None = None
    ) -> list[dict[str, Any]]:
        """Rows of any kind that meet a condition: see :mod:`streams.store.conditions`."""
        rows: list[dict[str, Any]] = self._table(columns, where, version, limit=limit).to_pylist()
        return rows

    def _table(self, columns: Sequence[str], where: str, version: int | None, **options: Any) -> pa.Table:
        dataset = self.table.open(version)
        if dataset is None:
            return pa.schema([SCHEMA.field(name) for name in columns]).empty_table()
        with reading_store(self.url):
            return dataset.to_table(columns=list(columns), filter=where, **options)

    def count_rows(self, where: str, version: int | None = None) -> int:
        dataset = self.table.open(version)
        if dataset is None:
            return 0
        with reading_store(self.url):
            return int(dataset.count_rows(filter=where))

    def batches(
        self,
        where: str,
        columns: Sequence[str],
        size: int = BATCH_ROWS,
        version: int | None = None,
        addresses: bool = False,
    ) -> Iterator[pa.RecordBatch]:
        dataset = self.table.open(version)
        if dataset is None:
            return
        bounds = {"batch_size": size, "batch_readahead": 2, "fragment_readahead": 2, "io_buffer_size": IO_BUFFER_BYTES}
        batches = iter(dataset.to_batches(columns=list(columns), filter=where, with_row_address=addresses, **bounds))
        while True:
            with reading_store(self.url):  # not around the yield: the caller's errors are not outages
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def newest(self, limit: int, where: str, columns: Sequence[str]) -> list[dict[str, Any]]:
        """The ``limit`` newest rows that meet a condition, newest first: position, time and ``columns``."""
        order = ["ingested_at", *_ORDER]
        keys = [(name, "descending") for name in order]
        best = pa.schema([SCHEMA.field(name) for name in order]).empty_table()
        wanted = [*order, *(name for name in columns if name not in order)]
        # Choose rows by their order alone and read other columns afterwards: images may be among them.
        for batch in self.batches(where, order):
            best = pa.concat_tables([best, pa.Table.from_batches([batch])])
            best = best.take(pc.select_k_unstable(best, limit, keys)) if best.num_rows > limit else best
        if not best.num_rows:
            return []
        oldest = pc.min(best["ingested_at"]).as_py()
        rows = [
            row
            for batch in self.batches(f"({where}) AND ingested_at >= {moment(oldest)}", wanted, size=64)
            for row in batch.to_pylist()
        ]
        return heapq.nlargest(limit, rows, key=lambda row: tuple(row[name] for name in order))

    # -- records ----------------------------------------------------------------------------------------------------

    def records(self, version: int | None = None) -> pa.Table:
        """The outcome of every record: kind, position, id, reason, detail, duplicate_of, until."""
        columns = ["kind", *_ORDER, "id", "reason", "detail", "duplicate_of", "until"]
        return self._table(columns, "kind != 'position'", version).sort_by([(name, "ascending") for name in _ORDER])

    def quarantined(self, limit: int, reason: str | None = None, source: str | None = None) -> list[dict[str, Any]]:
        """The newest quarantined records, newest first, without their bytes: position, reason, detail, source and time.
        An empty ``source`` selects records whose headers name none."""
        return self.newest(limit, quarantine_condition(reason, source), ["reason", "detail", "source"])

    def quarantined_record(self, stream: str, partition: int, offset: int) -> dict[str, Any] | None:
        rows = self.select(f"kind = 'quarantine' AND {at_offset(stream, partition, offset)}", _QUARANTINED)
        return rows[0] if rows else None

    def outbox(self, position: Position, limit: int) -> list[dict[str, Any]]:
        """The oldest quarantined records of a partition that may not be in the quarantine topic yet."""
        where = (
            f"kind = 'quarantine' AND topic = {quoted(position.stream)} AND partition = {position.partition}"
            f" AND offset >= {position.published} AND offset < {position.next}"
        )
        order = sorted(row["offset"] for row in self.select(where, ["offset"]))[:limit]
        if not order:
            return []
        rows = self.select(f"{where} AND offset <= {order[-1]}", _QUARANTINED)
        return sorted(rows, key=lambda row: int(row["offset"]))

    def deleted(self, version: int | None = None, since: datetime | None = None) -> pa.Table:
        """IDs of deleted samples and the time of deletion (``ingested_at`` of the receipt), optionally after
        ``since``."""
        where = "kind = 'deleted' AND id IS NOT NULL"
        if since is not None:
            where += f" AND ingested_at > {moment(since)}"
        if not self.tally(version)["deleted"]:
            where = "false"
        return self._table(["id", "ingested_at"], where, version)

    def gaps(self, limit: int = 100) -> list[dict[str, Any]]:
        if not self.tally()["gap"]:
            return []
        return self.newest(limit, "kind = 'gap'", ["until", "reason", "detail"])

    # -- files ------------------------------------------------------------------------------------------------------

    def fragments(self) -> int:
        """Number of data files that hold records; many small ones slow reading down."""
        dataset = self.table.open()
        return 0 if dataset is None else len(dataset.get_fragments()) - len(position_fragments(dataset))

    def size(self) -> int:
        dataset = self.table.open()
        fragments = [] if dataset is None else dataset.get_fragments()
        return sum(file.file_size_bytes or 0 for fragment in fragments for file in fragment.data_files())

    def put(self, rows: Rows, ends: Iterable[Position]) -> int:
        return StoreWriter(self.table).put(rows, ends)

    def _where(
        self,
        version: int | None,
        split: str | None,
        after: Mapping[str, int] | None,
        having: Having | None,
        without: Collection[str] = (),
    ) -> tuple[str, int | None]:
        """The condition, and the version to read with it: the one whose partitions it names."""
        clauses = ["kind = 'sample'"]
        if having is not None:
            clauses.append(f"{having} != ''")
        if split is not None:
            clauses.append(f"split = {quoted(split)}")
        if without:
            clauses.append(f"(source IS NULL OR NOT {is_in('source', map(quoted, sorted(without)))})")
        if after:
            # Ranges, which the index on the offset can prune.
            version = self.version() if version is None else version
            ranges = {**dict.fromkeys(self.positions(version), 0), **after}
            accepted = int(ranges.pop(ACCEPTED, 0))
            parts = [f"until > {accepted}"] if self.tally(version)["accepted"] else []
            for key, offset in sorted(ranges.items()):
                stream, _, partition = key.rpartition(":")
                parts.append(f"(topic = {quoted(stream)} AND partition = {int(partition)} AND offset >= {int(offset)})")
            clauses.append(f"({' OR '.join(parts)})")
        return " AND ".join(clauses), version


def _id_filters(ids: Sequence[str]) -> Iterator[str]:
    for some in chunks(sorted({each for each in ids if _ID.fullmatch(each)}), IDS_PER_QUERY):
        yield is_in("id", map(quoted, some))
