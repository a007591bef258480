"""Corrections: records that take the place of samples that came before.

A record with the content, the key and the source of a stored sample, and with other metadata, replaces it. From another
source it is a duplicate, so that two who send the same do not take turns. One with other content replaces what its
header ``ratchet_replaces`` names: a sample by its id, or all that came before with the record's key.
A key alone says nothing: many producers give one to all that a camera or a user sends.

The newest wins, by the time at which the records were sent: what is older than the sample that it would replace, or
than the record by which it was replaced itself, is a duplicate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Final

from streams.ingest.quality.duplicates import CORRECTED, DuplicateIndex
from streams.ingest.quality.validate import BY_KEY, Accepted, StoreRow
from streams.store.rows import CLAIM, RecordPosition, deletion_row, hexadecimal, name_of, position_of, quoted
from streams.store.table import SampleTable, reading

METADATA: Final = ("source", "domain", "concept", "label", "tags", "extra")
NAMES_PER_QUERY: Final = 500
_COLUMNS: Final = [
    "kind",
    "topic",
    "partition",
    "offset",
    "id",
    "split",
    "key",
    "text",
    "question",
    "sent_at",
    *METADATA,
]


class Corrections:
    """What the records of one batch replace: stored samples, and those that are before them in the batch."""

    def __init__(self, table: SampleTable, index: DuplicateIndex, records: Sequence[Accepted]) -> None:
        """Read what they may replace.

        Args:
            table: the store.
            index: up to date with it.
            records: of the batch.

        Raises:
            StoreUnavailable: it cannot be read.
        """
        self.replaced: dict[RecordPosition, StoreRow] = {}
        """Receipts of what was replaced, by its position."""
        self._by_id: dict[str, StoreRow] = {}
        self._by_key: dict[bytes, dict[RecordPosition, StoreRow]] = defaultdict(dict)
        ids = {each.row["id"] for each in records if each.row["key"] is not None and index.has(each.row["id"])}
        ids |= {each.replaces for each in records if each.replaces not in ("", BY_KEY)}
        keys = {each.row["key"] for each in records if each.replaces == BY_KEY}
        dataset = table.open() if ids or keys else None
        named = (("kind = 'sample' AND id", map(quoted, ids)),
                 ("(kind = 'sample' OR reason = 'duplicate_exact') AND key", map(hexadecimal, keys)))  # fmt: skip
        for column, values in named:
            while dataset is not None and (some := list(islice(values, NAMES_PER_QUERY))):
                where = f"{column} IN ({', '.join(some)})"
                with reading(table.url):
                    rows = dataset.to_table(columns=_COLUMNS, filter=where).to_pylist()
                for row in rows:
                    self.add(row)

    def add(self, row: StoreRow) -> None:
        """A sample that is stored, or is going to be; or a duplicate, by which its key holds on to one."""
        if row["kind"] == "sample":
            self._by_id[row["id"]] = row
        if row["key"] is not None:
            self._by_key[row["key"]][position_of(row)] = row

    def targets(self, record: Accepted) -> list[StoreRow]:
        """The samples that a record would replace, and the duplicates."""
        row = record.row
        found: list[StoreRow] = []
        if record.replaces == BY_KEY:
            found += self._by_key[row["key"]].values()
        elif record.replaces in self._by_id:
            found.append(self._by_id[record.replaces])
        same = self._by_id.get(row["id"])
        if same is not None and same not in found and row["key"] is not None and _sender(row) == _sender(same):
            found.append(same)
        return [each for each in found if each["id"] != row["id"] or _differs(each, row)]

    def replace(self, old: StoreRow, new: StoreRow) -> None:
        """Let a receipt stand for a sample or a duplicate."""
        stays = old["id"] == new["id"] or old["kind"] == "duplicate"  # stored as before, so nobody is to forget it
        receipt = deletion_row(old, CORRECTED, f"by {name_of(position_of(new))}", datetime.now(UTC), stays)
        self.replaced[position_of(old)] = {**receipt, "sent_at": new["sent_at"]}
        if self._by_id.get(old["id"]) is old:
            del self._by_id[old["id"]]
        if old["key"] is not None:
            self._by_key[old["key"]].pop(position_of(old), None)

    def settled(self, rows: Sequence[StoreRow]) -> list[StoreRow]:
        """The rows of the batch as they are to be stored, with receipts for those that later ones replaced. What stays
        in :attr:`replaced` is in the store.

        A sample that is replaced stays where another record of the batch sent it, too: it passes to that one.
        """
        receipts = {place: self.replaced.pop(place) for place in map(position_of, rows) if place in self.replaced}
        left = {
            row["id"]: row for row in rows if row["kind"] == "sample" and receipts.get(position_of(row), {}).get("id")
        }
        settled = []
        for row in rows:
            receipt = receipts.get(position_of(row))
            if receipt is None and row["kind"] == "duplicate" and row["reason"] == "duplicate_exact":
                sample = left.pop(row["id"], None)
                if sample is not None:
                    receipts[position_of(sample)] |= {"id": None, "duplicate_of": row["id"]}
                    row = {**sample, **{name: row[name] for name in CLAIM}}
            settled.append(receipt or row)
        return settled


def is_newer(stored: StoreRow, record: StoreRow) -> bool:
    """Whether a stored sample was sent after a record. One of an earlier version of Ratchet is taken for older."""
    return bool(stored["sent_at"] is not None and stored["sent_at"] > record["sent_at"])


def _sender(row: StoreRow) -> tuple[bytes | None, str]:
    return row["key"], row["source"] or ""


def _differs(old: StoreRow, new: StoreRow) -> bool:
    return old["kind"] == "sample" and any(old[name] != new[name] for name in METADATA)
