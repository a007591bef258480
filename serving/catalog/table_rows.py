"""The rows of a catalog table: their schema, with the id as primary key, and ids in SQL."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

IDS_AT_ONCE: Final = 500
PRIMARY_KEY: Final = {"lance-schema:unenforced-primary-key": "true"}


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
    key = pa.field("id", pa.string(), nullable=False, metadata=PRIMARY_KEY)
    return pa.schema([key if field.name == "id" else field for field in schema])


def has_key(schema: pa.Schema) -> bool:
    """Whether a table has its primary key; those of older versions have none."""
    metadata = schema.field("id").metadata or {}
    return any(key.decode() in PRIMARY_KEY for key in metadata)


def quoted(ids: Collection[str]) -> Iterator[str]:
    """Lists of SQL strings, some hundred ids in each."""
    wanted = sorted(each for each in ids if each.isalnum())
    for start in range(0, len(wanted), IDS_AT_ONCE):
        yield ", ".join(f"'{each}'" for each in wanted[start : start + IDS_AT_ONCE])
