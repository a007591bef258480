"""Conditions on rows of the sample store, in Lance's SQL. What comes from outside is written as a literal."""

from __future__ import annotations

from datetime import UTC, datetime


def quoted(text: str) -> str:
    """A string literal."""
    return "'" + text.replace("'", "''") + "'"


def moment(time: datetime) -> str:
    """A time as a literal."""
    # Not strftime: it writes the year 1 as "1", which Lance cannot read.
    return f"timestamp '{time.astimezone(UTC).replace(tzinfo=None).isoformat(' ', 'microseconds')}'"


def hexadecimal(data: bytes) -> str:
    """A binary literal."""
    return f"X'{data.hex()}'"


def at_offset(stream: str, partition: int, offset: int) -> str:
    """The rows of one record."""
    return f"topic = {quoted(stream)} AND partition = {int(partition)} AND offset = {int(offset)}"


def in_gap(stream: str, partition: int, offset: int) -> str:
    """The gaps that an offset lies in."""
    place = f"topic = {quoted(stream)} AND partition = {int(partition)}"
    return f"kind = 'gap' AND {place} AND offset <= {int(offset)} AND until > {int(offset)}"


def refused(reason: str | None = None, source: str | None = None, since: datetime | None = None) -> str:
    """Refused records: for a reason, of a source (empty: of none that is known), refused at or after a time."""
    clauses = ["kind = 'quarantine'"]
    if reason is not None:
        clauses.append(f"reason = {quoted(reason)}")
    if source is not None:
        clauses.append(f"source = {quoted(source)}" if source else "(source = '' OR source IS NULL)")
    if since is not None:
        clauses.append(f"ingested_at >= {moment(since)}")
    return " AND ".join(clauses)
