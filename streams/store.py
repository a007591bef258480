"""The sample store: one Lance table that holds the samples and how far the topic has been read, always in step.

A commit appends the rows of a batch and, in the same Lance transaction, replaces the fragment that holds the positions
of all partitions. That fragment is also the fence: a commit that was prepared on older positions would have to remove
a fragment that is gone, and Lance refuses it. So a batch is stored together with its offsets or not at all, and of two
processes that read the same partition (a pause, a rebalance) only one can store each record.

>>> store = SampleStore(settings.lake)
>>> store.count(split="train")
>>> fresh = store.scan(split="train", after=update.data_to, columns=["id", "text"])
"""

from __future__ import annotations

import heapq
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal

import lance
import pyarrow as pa
import pyarrow.compute as pc
from lance.commit import CommitConflictError
from lance.fragment import write_fragments

from ops.errors import StoreError
from streams.rows import SAMPLE_COLUMNS, SAMPLE_SCHEMA, SCHEMA, Position, Snapshot

Rows = Sequence[Mapping[str, Any]]
Having = Literal["text", "question"]
Build = Callable[[Snapshot], tuple[Rows, Iterable[Position]]]

ATTEMPTS = 20  # conflicts come from other ingest processes; each try is some 10 ms, and they commit every 2 s
IDS_PER_QUERY = 500
#: Fragments of at least this many rows are left as they are, so compaction writes each sample a few times, not again
#: with every batch: 16 batches of 256 fill one.
FRAGMENT_ROWS = 4096
FRAGMENT_BYTES = 1 << 30
KEEP_VERSIONS = timedelta(days=7)
_ID = re.compile(r"[0-9a-f]{64}")
_ORDER = ("topic", "partition", "offset")
_REFUSED = [*_ORDER, "reason", "detail", "ingested_at", "original", "original_key", "original_headers"]


class SampleStore:
    """Samples at ``<lake url>/samples.lance``. Where there is no table yet: version 0 and no rows.

    Every reading method takes ``version`` (default: the latest), and answers the same for the same version for as long
    as the version is kept (:data:`KEEP_VERSIONS` after a compaction).
    """

    def __init__(self, url: str) -> None:
        self.url = f"{url.rstrip('/')}/samples.lance"

    # -- reading ----------------------------------------------------------------------------------------------------

    def version(self) -> int:
        """The latest version; it grows with each commit."""
        dataset = self._open(None)
        return 0 if dataset is None else int(dataset.version)

    def offsets(self, version: int | None = None) -> dict[str, int]:
        """Next offset to read of each partition, by ``topic:partition`` (``topic@n:partition`` after a lost log)."""
        return {key: position.next for key, position in self.snapshot(version).positions.items()}

    def count(
        self,
        version: int | None = None,
        split: str | None = None,
        after: Mapping[str, int] | None = None,
        having: Having | None = None,
    ) -> int:
        """Number of samples; of a split; at or after the given offsets; that have a text, or a question."""
        dataset = self._open(version)
        return 0 if dataset is None else int(dataset.count_rows(filter=_where(split, after, having)))

    def scan(
        self,
        version: int | None = None,
        split: str | None = None,
        after: Mapping[str, int] | None = None,
        columns: Sequence[str] | None = None,
        ids: Sequence[str] | None = None,
        having: Having | None = None,
    ) -> pa.Table:
        """Samples in the order of (topic, partition, offset).

        Args:
            version: a pinned version.
            split: ``train`` or ``fresh_eval``.
            after: next offsets, as :meth:`offsets` gives: samples before them are left out. Partitions that it does
                not name are returned whole.
            columns: of :data:`~streams.rows.SAMPLE_COLUMNS`; all by default, images included: name what you need.
            ids: only these; unknown ones are passed over.
            having: only samples that have a ``text`` (what a CLIP learns from), or a ``question`` (a VLM).
        """
        wanted = list(SAMPLE_COLUMNS if columns is None else columns)
        if unknown := set(wanted) - set(SAMPLE_COLUMNS):
            raise StoreError(f"samples have no column {sorted(unknown)}.", f"Columns: {', '.join(SAMPLE_COLUMNS)}.")
        dataset = self._open(version)
        schema = pa.schema([SAMPLE_SCHEMA.field(name) for name in wanted])
        if dataset is None:
            return schema.empty_table()
        read = [*wanted, *(name for name in _ORDER if name not in wanted)]
        where = _where(split, after, having)
        filters = [where] if ids is None else [f"({where}) AND {part}" for part in _id_filters(ids)]
        parts = [dataset.to_table(columns=read, filter=each) for each in filters]
        if not parts:
            return schema.empty_table()
        table = pa.concat_tables(parts)
        order = pc.sort_indices(table.select(_ORDER), sort_keys=[(name, "ascending") for name in _ORDER])
        return table.take(order).select(wanted)

    def image(self, ids: Sequence[str]) -> dict[str, bytes]:
        """Encoded images by sample id; unknown ids are missing."""
        table = self.scan(ids=ids, columns=["id", "image"])
        return dict(zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True))

    def records(self, version: int | None = None) -> pa.Table:
        """What became of every record: kind (sample, duplicate or quarantine), position, id, reason, detail."""
        columns = ["kind", "topic", "partition", "offset", "id", "reason", "detail", "duplicate_of"]
        dataset = self._open(version)
        if dataset is None:
            return pa.schema([SCHEMA.field(name) for name in columns]).empty_table()
        table = dataset.to_table(columns=columns, filter="kind != 'position'")
        return table.sort_by([(name, "ascending") for name in _ORDER])

    def refusals(self, limit: int, reason: str | None = None) -> list[dict[str, Any]]:
        """The newest refused records, newest first, without their bytes: position, reason, detail and time."""
        columns = [*_ORDER, "reason", "detail", "ingested_at"]
        dataset = self._open(None)
        if dataset is None:
            return []
        where = "kind = 'quarantine'" if reason is None else f"kind = 'quarantine' AND reason = {_quoted(reason)}"
        rows = (row for batch in dataset.to_batches(columns=columns, filter=where) for row in batch.to_pylist())
        return heapq.nlargest(limit, rows, key=lambda row: (row["ingested_at"], *(row[name] for name in _ORDER)))

    def refusal(self, stream: str, partition: int, offset: int) -> dict[str, Any] | None:
        """One refused record with its bytes, or None where there is none at this position."""
        dataset = self._open(None)
        if dataset is None:
            return None
        where = (
            f"kind = 'quarantine' AND topic = {_quoted(stream)} AND partition = {int(partition)}"
            f" AND offset = {int(offset)}"
        )
        rows: list[dict[str, Any]] = dataset.to_table(columns=_REFUSED, filter=where).to_pylist()
        return rows[0] if rows else None

    def fragments(self) -> int:
        """Number of data files; many small ones make reading slow, see :meth:`compact`."""
        dataset = self._open(None)
        return 0 if dataset is None else len(dataset.get_fragments())

    def size(self) -> int:
        """Bytes of the data files of the latest version."""
        dataset = self._open(None)
        fragments = [] if dataset is None else dataset.get_fragments()
        return sum(file.file_size_bytes or 0 for fragment in fragments for file in fragment.data_files())

    # -- for ingest -------------------------------------------------------------------------------------------------

    def snapshot(self, version: int | None = None) -> Snapshot:
        """A version with the positions that it holds: what a commit is based on."""
        dataset = self._open(version)
        if dataset is None:
            return Snapshot(0)
        columns = ["topic", "partition", "offset", "topic_id", "published"]
        table = dataset.to_table(columns=columns, filter="kind = 'position'", with_row_address=True)
        fence = {int(address) >> 32 for address in table["_rowaddr"].to_pylist()}
        rows = table.select(columns).to_pylist()
        found = [Position(*(row[name] for name in columns)) for row in rows if row["partition"] >= 0]
        return Snapshot(int(dataset.version), {each.key: each for each in found}, tuple(sorted(fence)))

    def commit(self, build: Build) -> int:
        """Store what ``build(snapshot)`` returns: new rows, and the positions that have moved. Returns the new version.

        ``build`` is called again on a newer snapshot when another process committed in between, so whatever it decides
        (a duplicate or not; still ours or not) holds at the very version that the commit follows. It may raise to
        give up.

        Raises:
            StoreError: the store cannot be written, or other processes won every try.
        """
        for attempt in range(ATTEMPTS):
            snapshot = self.snapshot() if self._open(None) is not None else self._create()
            rows, moved = build(snapshot)
            positions = {**snapshot.positions, **{position.key: position for position in moved}}
            fence = [position.row() for position in positions.values()] or [_EMPTY_FENCE]
            try:
                return self._replace_fence(snapshot, rows, fence)
            except CommitConflictError:
                time.sleep(random.uniform(0.005, 0.02) * (attempt + 1))  # noqa: S311  (spreads the tries)
            except OSError as error:
                raise StoreError(
                    f"the sample store {self.url} cannot be written: {error}.", "Check space and permissions."
                ) from error
        raise StoreError(
            f"the sample store {self.url} could not be written: {ATTEMPTS} conflicts in a row.",
            "Are there many more ingest processes than partitions? Stop some.",
        )

    def identities(self, snapshot: Snapshot, known: set[int]) -> Iterator[tuple[int, pa.Table]]:
        """What the search for duplicates needs of each fragment that is not in ``known``: id, phash and texts."""
        dataset = self._open(snapshot.version) if snapshot.version else None
        for fragment in [] if dataset is None else dataset.get_fragments():
            number = int(fragment.fragment_id)
            if number not in known and number not in snapshot.fence:
                columns = ["id", "phash", "text", "question", "answer"]
                yield number, fragment.to_table(columns=columns, filter="kind = 'sample'")

    def outbox(self, position: Position) -> list[dict[str, Any]]:
        """Refused records of a partition that are not known to be in the quarantine topic, oldest first."""
        dataset = self._open(None)
        if dataset is None:
            return []
        where = (
            f"kind = 'quarantine' AND topic = {_quoted(position.stream)} AND partition = {position.partition}"
            f" AND offset >= {position.published}"
        )
        table = dataset.to_table(columns=_REFUSED, filter=where)
        rows: list[dict[str, Any]] = table.sort_by("offset").to_pylist()
        return rows

    def compact(self, keep: timedelta = KEEP_VERSIONS) -> int:
        """Merge small fragments, and forget versions older than ``keep``. Returns the number of fragments afterwards.

        Safe beside running ingest processes: the positions' fragment is left alone, and when a commit comes between,
        this one gives up until the next call.
        """
        snapshot = self.snapshot()
        dataset = self._open(snapshot.version or None)
        if dataset is None:
            return 0
        try:
            dataset.optimize.compact_files(
                target_rows_per_fragment=FRAGMENT_ROWS,
                max_bytes_per_file=FRAGMENT_BYTES,
                excluded_fragment_ids=list(snapshot.fence),
                num_threads=1,
                batch_size=64,
            )
            dataset.cleanup_old_versions(older_than=keep)
        except CommitConflictError:
            return self.fragments()
        return self.fragments()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _open(self, version: int | None) -> Any:
        if version == 0:
            return None
        try:
            return lance.dataset(self.url, version=version)
        except (ValueError, OSError) as error:
            if "not found" not in str(error).lower():
                raise StoreError(
                    f"the sample store {self.url} cannot be read: {error}.", "Check `lake_url`."
                ) from error
            if version is None:
                return None
            raise StoreError(
                f"the sample store {self.url} has no version {version} (any more).",
                f"Versions are kept for {KEEP_VERSIONS.days} days; start again from the latest.",
            ) from error

    def _create(self) -> Snapshot:
        """Make the table, with a fence. Of processes that start at once one makes it, and the others take it."""
        table = pa.Table.from_pylist([_EMPTY_FENCE], schema=SCHEMA)
        try:
            # Not write_dataset(mode="create"): that one, when it loses the race, overwrites the winner's table. With no
            # retries the commit writes version 1 or fails.
            fragments = write_fragments(table, self.url, schema=SCHEMA, mode="create")
            lance.LanceDataset.commit(self.url, lance.LanceOperation.Overwrite(SCHEMA, fragments), max_retries=0)
        except OSError as error:
            if self._open(None) is None:
                raise StoreError(
                    f"the sample store {self.url} cannot be made: {error}.", "Check `lake_url`."
                ) from error
        return self.snapshot()

    def _replace_fence(self, snapshot: Snapshot, rows: Rows, fence: Rows) -> int:
        new = []
        for part in (rows, fence):
            if part:
                table = pa.Table.from_pylist(list(part), schema=SCHEMA)
                new += write_fragments(table, self.url, schema=SCHEMA, mode="append")
        operation = lance.LanceOperation.Update(
            removed_fragment_ids=list(snapshot.fence),
            updated_fragments=[],
            new_fragments=new,
            fields_modified=[],
        )
        return int(lance.LanceDataset.commit(self.url, operation, read_version=snapshot.version, max_retries=0).version)


_EMPTY_FENCE: dict[str, Any] = Position("", -1, 0).row()


def _where(split: str | None, after: Mapping[str, int] | None, having: Having | None) -> str:
    clauses = ["kind = 'sample'"]
    if having is not None:
        clauses.append(f"{having} != ''")
    if split is not None:
        clauses.append(f"split = {_quoted(split)}")
    for key, offset in (after or {}).items():
        stream, _, partition = key.rpartition(":")
        clauses.append(f"NOT (topic = {_quoted(stream)} AND partition = {int(partition)} AND offset < {int(offset)})")
    return " AND ".join(clauses)


def _id_filters(ids: Sequence[str]) -> Iterator[str]:
    valid = sorted({each for each in ids if _ID.fullmatch(each)})
    for start in range(0, len(valid), IDS_PER_QUERY):
        names = ", ".join(_quoted(each) for each in valid[start : start + IDS_PER_QUERY])
        yield f"id IN ({names})"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
