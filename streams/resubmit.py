"""Refused records: looking at them, and sending one again as it came, once what refused it has been mended.

A record is named by its *place*, ``topic:partition:offset`` of where it was refused. It is read from the sample store,
which has every refused record with its bytes, and sent to the topic again with a header that tells where it was.

The place is claimed in the ledger before and settled after: a second call is refused. A process that dies in between
leaves the claim, and only ``force`` sends again. Whatever is sent twice all the same is found by ingest: equal samples
are stored once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from core.errors import RatchetError, RecordError, UnknownRecord
from core.ledger import Ledger, ResubmissionRow
from core.settings import Settings
from ratchet_client.broker import CONNECT_SECONDS
from ratchet_client.encoding import Encoded, Headers
from ratchet_client.producer import Delivery, RecordSender
from streams.clients import connection
from streams.quarantine import original
from streams.store import SampleStore

PUBLISH_SECONDS: Final = 20.0
#: Header of a record that was sent again: the place where it was refused. Decoders pass it by: it is no field.
HEADER: Final = "x-ratchet-resubmission-of"
_PLACE: Final = re.compile(r"([^:]{1,260}):([0-9]{1,9}):([0-9]{1,18})")


@dataclass(frozen=True, slots=True)
class RefusedRecord:
    """A record in quarantine, without its bytes."""

    place: str
    reason: str
    """One of :data:`ratchet_client.records.REASONS`."""
    detail: str
    source: str
    """Who sent it, as far as its headers say."""
    refused_at: datetime
    resubmission: ResubmissionRow | None
    """The last time that it was sent again."""


def list_quarantine(
    settings: Settings, ledger: Ledger, limit: int = 50, reason: str | None = None, source: str | None = None
) -> list[RefusedRecord]:
    """The newest refused records, newest first; of a reason, of a source (empty: of none). Raises StoreError."""
    rows = SampleStore(settings.lake).refusals(limit, reason, source)
    places = [f"{row['topic']}:{row['partition']}:{row['offset']}" for row in rows]
    again = ledger.resubmissions(places)
    return [
        RefusedRecord(place, row["reason"], row["detail"], row["source"] or "", row["ingested_at"], again.get(place))
        for place, row in zip(places, rows, strict=True)
    ]


def quarantined(settings: Settings, place: str) -> Encoded:
    """A refused record as it came: key, value and headers. :func:`streams.codecs.glimpse` shows what is in it.

    Raises:
        UnknownRecord: nothing was refused there.
    """
    stream, partition, offset = _parse(place)
    row = SampleStore(settings.lake).refusal(stream, partition, offset)
    if row is None:
        raise UnknownRecord(f"no record was refused at {place[:300]}.", "See `GET /admin/v1/quarantine` for places.")
    return original(row)


def resubmit(
    settings: Settings, ledger: Ledger, place: str, *, actor: str, reason: str, force: bool = False
) -> Delivery:
    """Send a refused record to the topic again, and wait until the broker has it. Leaves an audit row.

    Raises:
        UnknownRecord: nothing was refused at the place.
        RecordError: the record has no value, so there is nothing to send.
        AlreadyResubmitted: it was sent again before, and ``force`` is not set.
        BrokerError: the broker did not take it; it may be tried again.
    """
    record = quarantined(settings, place)
    if not record.value:
        raise RecordError("empty", f"record {place} has no value.", "There is nothing to send again.")
    ledger.begin_resubmission(place, actor=actor, reason=reason, force=force)
    try:
        delivery = _send(settings, Encoded(record.key, record.value, headers_of(record, place)))
    except RatchetError as error:
        ledger.end_resubmission(place, str(error))
        raise
    ledger.end_resubmission(place)
    return delivery


def headers_of(record: Encoded, place: str) -> Headers:
    """The headers under which a refused record is sent again: its own, and where it was refused."""
    return [*((name, value) for name, value in record.headers if name != HEADER), (HEADER, place.encode())]


def _send(settings: Settings, record: Encoded) -> Delivery:
    sender = RecordSender(connection(settings.kafka), CONNECT_SECONDS, PUBLISH_SECONDS)
    try:
        sent = sender.send(settings.kafka.topic, record)
        sender.flush(PUBLISH_SECONDS)
        return sent.result(timeout=1)
    finally:
        sender.close(timeout=1.0)


def _parse(place: str) -> tuple[str, int, int]:
    match = _PLACE.fullmatch(place)
    if match is None:
        raise UnknownRecord(f"{place[:300]!r} is no place.", "A place reads topic:partition:offset.")
    return match[1], int(match[2]), int(match[3])
