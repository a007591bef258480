"""Conditions on rows of the sample store, in Lance's SQL. Values from outside are always quoted as literals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final

from streams.store.rows import RecordPosition

CONTENT: Final = "kind IN ('sample', 'quarantine')"
SENT: Final = "kind IN ('sample', 'duplicate', 'quarantine')"
"""Rows with the origin of a record, which deletions select."""
IDS_PER_QUERY: Final = 500


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def moment(time: datetime) -> str:
    # Not strftime: it writes the year 1 as "1", which Lance cannot read.
    return f"timestamp '{time.astimezone(UTC).replace(tzinfo=None).isoformat(' ', 'microseconds')}'"


def hexadecimal(data: bytes) -> str:
    return f"X'{data.hex()}'"


def is_in(column: str, literals: Iterable[str]) -> str:
    """The rows whose column has one of some values; none if there are no values."""
    return f"{column} IN ({values})" if (values := ", ".join(literals)) else "false"


def at_offset(stream: str, partition: int, offset: int) -> str:
    return f"topic = {quoted(stream)} AND partition = {int(partition)} AND offset = {int(offset)}"


def in_gap(stream: str, partition: int, offset: int) -> str:
    place = f"topic = {quoted(stream)} AND partition = {int(partition)}"
    return f"kind = 'gap' AND {place} AND offset <= {int(offset)} AND until > {int(offset)}"


def quarantine_condition(reason: str | None = None, source: str | None = None, since: datetime | None = None) -> str:
    clauses = ["kind = 'quarantine'"]
    if reason is not None:
        clauses.append(f"reason = {quoted(reason)}")
    if source is not None:
        clauses.append(f"source = {quoted(source)}" if source else "(source = '' OR source IS NULL)")
    if since is not None:
        clauses.append(f"ingested_at >= {moment(since)}")
    return " AND ".join(clauses)


def at_positions(places: Iterable[RecordPosition]) -> str:
    offsets: dict[tuple[str, int], list[int]] = defaultdict(list)
    for stream, partition, offset in places:
        offsets[stream, partition].append(offset)
    return " OR ".join(
        f"(topic = {quoted(stream)} AND partition = {partition} AND offset IN ({', '.join(map(str, each))}))"
        for (stream, partition), each in offsets.items()
    )
