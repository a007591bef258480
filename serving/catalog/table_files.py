"""The rows of a catalog table with the id as primary key, ids in SQL, and what is done to its data files."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

import lance
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from serving.catalog.sample_digests import digests_of, keys_of

IDS_AT_ONCE: Final = 500
_PRIMARY_KEY: Final = {"lance-schema:unenforced-primary-key": "true"}
Vectors = npt.NDArray[np.float32]
TARGET_ROWS: Final = 65_536
"""Of a data file after small ones were merged."""
BATCH_ROWS: Final = 4096


def table_of(rows: pa.Table, vectors: npt.NDArray[np.float32]) -> pa.Table:
    """Rows (id, domain, source, time, text) with their vectors [n, dim], in a table's schema."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1), pa.float32()), vectors.shape[1])
    data = pa.table(
        {
            "id": rows["id"].cast(pa.string()),
            "vector": column,
            "domain": rows["domain"].cast(pa.string()),
            "source": rows["source"].cast(pa.string()),
            "time": rows["time"].cast(pa.timestamp("us", tz="UTC")),
            "text": rows["text"].cast(pa.string()),
        }
    )
    return data.cast(with_key(data.schema))


def with_key(schema: pa.Schema) -> pa.Schema:
    """The schema with its primary key."""
    key = pa.field("id", pa.string(), nullable=False, metadata=_PRIMARY_KEY)
    return pa.schema([key if field.name == "id" else field for field in schema])


def has_key(schema: pa.Schema) -> bool:
    """Whether a table has its primary key; those of older versions have none."""
    metadata = schema.field("id").metadata or {}
    return any(key.decode() in _PRIMARY_KEY for key in metadata)


def quoted(ids: Collection[str]) -> Iterator[str]:
    """Lists of SQL strings, some hundred ids in each."""
    wanted = sorted(each for each in ids if each.isalnum())
    for start in range(0, len(wanted), IDS_AT_ONCE):
        yield ", ".join(f"'{each}'" for each in wanted[start : start + IDS_AT_ONCE])


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The nearest rows to one query, best first."""

    scores: npt.NDArray[np.float32]
    """Cosine similarities [k]."""
    keys: npt.NDArray[np.uint64]
    """See :func:`serving.catalog.sample_digests.keys_of`."""


def merge_files(dataset: lance.LanceDataset) -> None:
    """Merge small data files."""
    drop_indexes(dataset)
    dataset.optimize.compact_files(target_rows_per_fragment=TARGET_ROWS)


def write_out_deletions(dataset: lance.LanceDataset) -> None:
    """Write the data files anew that still hold the bytes of removed rows.

    Not LanceDB's optimize: that leaves a file as it is of which less than a tenth was removed.
    """
    drop_indexes(dataset)
    clean = [each.fragment_id for each in dataset.get_fragments() if not each.num_deletions]
    dataset.optimize.compact_files(
        target_rows_per_fragment=1, materialize_deletions=True, materialize_deletions_threshold=0.0,
        excluded_fragment_ids=clean,
    )  # fmt: skip


def drop_indexes(dataset: lance.LanceDataset) -> None:
    """Drop Lance's own indexes, which the version before this one made: searches do not read them, and each rewrite of
    a data file would have to bring them up to date.
    """
    for index in dataset.describe_indices():
        dataset.drop_index(index.name)


def nearest_rows(
    dataset: lance.LanceDataset, queries: npt.NDArray[np.float32], k: int, condition: str = ""
) -> list[Neighbours]:
    """The ``k`` nearest rows to each of the queries [n, dim], exactly.

    In one pass over the table, which holds some thousand vectors in memory at once.
    """
    unit = unit_rows(queries)
    best = np.empty((len(queries), 0), np.float32)
    keys = np.empty((len(queries), 0), np.uint64)
    for batch_keys, vectors in _vectors(dataset, condition):
        scores = np.concatenate([best, unit @ unit_rows(vectors).T], axis=1)
        names = np.concatenate([keys, np.broadcast_to(batch_keys, (len(queries), len(batch_keys)))], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best, keys = np.take_along_axis(scores, order, 1), np.take_along_axis(names, order, 1)
    return [Neighbours(*each) for each in zip(best, keys, strict=True)]


def unit_rows(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Vectors [n, dim] of unit length; those without a direction become zeros."""
    vectors = np.asarray(vectors, np.float32)
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return np.ascontiguousarray(np.nan_to_num(unit, posinf=0.0, neginf=0.0), np.float32)


def vectors_of(rows: pa.RecordBatch | pa.Table) -> Vectors:
    """The vectors [n, dim] of some rows."""
    column = rows.column("vector")
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, np.float32).reshape(rows.num_rows, -1)


def _vectors(
    dataset: lance.LanceDataset, condition: str
) -> Iterator[tuple[npt.NDArray[np.uint64], npt.NDArray[np.float32]]]:
    for batch in dataset.to_batches(columns=["id", "vector"], filter=condition or None, batch_size=BATCH_ROWS):
        if batch.num_rows:
            yield keys_of(digests_of(batch.column("id"))), vectors_of(batch)
