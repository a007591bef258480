"""Many tombstones carried out together: two scans of the store and a commit for all of them, not for each.

A selector of a tombstone is a key or an id, with the bounds that ingest gave it. So one scan finds the rows of a
thousand, and which of them a row belongs to is found in memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Any, Final

from core.ledger import DeletionRow, Ledger
from streams.conditions import hexadecimal, quoted
from streams.deletion import TOMBSTONES, record_receipts
from streams.rows import RecordPosition, parse_position, position_of, record_key
from streams.store import SampleStore
from streams.writer import SENT, StoreWriter

ROWS_AT_ONCE: Final = 2000
"""Rows that one commit removes."""
_COLUMNS: Final = ["kind", "topic", "partition", "offset", "id", "key", "original_key", "ingested_at"]
_SELECTORS: Final = ({"key", "before", "until"}, {"id", "before", "until"})


def is_tombstone(deletion: DeletionRow) -> bool:
    """Whether :func:`remove_together` can carry out a deletion."""
    return deletion.id.startswith(TOMBSTONES) and set(deletion.selector) in _SELECTORS


def remove_together(store: SampleStore, ledger: Ledger, deletions: Sequence[DeletionRow]) -> int:
    """Like :func:`streams.deletion.remove` for each of them. Returns the number of rows.

    Args:
        store: where they are removed.
        ledger: is told what was removed.
        deletions: for which :func:`is_tombstone` holds, in the order in which they were requested.

    Raises:
        StoreUnavailable: to be tried again.
    """
    if not deletions:
        return 0
    found = dict(_rows(store, deletions))
    hit = set(found.values())
    changed = [each for each in deletions if each.state != "removed" or each.version is None or each.id in hit]
    for each in changed:
        if each.state == "removed":
            ledger.deletion_reopened(each.id)
    removed, left = 0, iter(found.items())
    while some := dict(islice(left, ROWS_AT_ONCE)):
        removed += len(StoreWriter(store.table).remove_rows(some))
    record_receipts(store, ledger, [each.id for each in changed])
    return removed


def _rows(store: SampleStore, deletions: Sequence[DeletionRow]) -> Iterator[tuple[RecordPosition, str]]:
    """Where each row is that one of them selects, with the id of the first that does."""
    by_name: dict[str | bytes, list[DeletionRow]] = defaultdict(list)
    for each in deletions:
        selector = each.selector
        name = selector["id"] if "id" in selector else record_key(bytes.fromhex(selector["key"])) or b""
        by_name[name].append(each)
    ids = ", ".join(quoted(name) for name in by_name if isinstance(name, str))
    keys = ", ".join(hexadecimal(name) for name in by_name if isinstance(name, bytes))
    clauses = [f"id IN ({ids})"] if ids else []
    if keys:  # see streams.deletion for refused records of earlier versions
        older = f"(original_key IN ({keys}) OR sha256(original_key) IN ({keys}))"
        clauses += [f"key IN ({keys})", f"(kind = 'quarantine' AND key IS NULL AND {older})"]
    for batch in store.batches(f"{SENT} AND ({' OR '.join(clauses)})", _COLUMNS):
        for row in batch.to_pylist():
            key = row["key"] if row["key"] is not None else record_key(row["original_key"])
            for name in (row["id"], key):
                named = by_name.get(name, ()) if name is not None else ()
                first = next((each for each in named if _covers(each.selector, row)), None)
                if first is not None:
                    yield position_of(row), first.id
                    break


def _covers(selector: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether a row came before a tombstone: by its offset in the same partition, by the clock in others."""
    topic, partition, offset = parse_position(selector["until"])
    if (row["topic"], row["partition"]) == (topic, partition):
        return bool(row["offset"] < offset)
    return bool(row["ingested_at"] < datetime.fromisoformat(selector["before"]))
