"""Validation of one record: it becomes a sample, a tombstone (a request to delete), or a quarantined record with a
reason."""

from __future__ import annotations

import base64
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from core.errors import BrokerError, RecordError, StoreError
from core.settings.streams import Ingest as Limits
from core.settings.streams import Kafka
from ratchet_client.images import decode_image
from ratchet_client.records import DEFAULT_LIMITS, Sample, check_text
from streams.ingest.perceptual_hash import perceptual_hash
from streams.ingest.sources import source_of
from streams.records import signatures
from streams.records.codecs import Fetch, decode
from streams.records.registry import SchemaRegistry
from streams.store.rows import RecordPosition, record_key, words_hash

log = logging.getLogger(__name__)
DETAIL_CHARS: Final = 500
ID_HEADER: Final = "ratchet_id"
"""Header of a tombstone that names the sample to delete by ID instead of by the record's key."""
REPLACES_HEADER: Final = "ratchet_replaces"
"""Header of a sample that corrects others: a sample ID, or :data:`BY_KEY`."""
BY_KEY: Final = "key"
"""Everything earlier with the record's key."""
_ID: Final = re.compile("[0-9a-f]{64}")
_LATEST_SECONDS: Final = 4_102_444_800  # 2100-01-01: no clock is that wrong, but units may be

StoreRow = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Received:
    """A record from Kafka. ``stream`` is the topic with its generation."""

    stream: str
    partition: int
    offset: int
    value: bytes | None
    key: bytes | None = None
    headers: Sequence[tuple[str, bytes | None]] = ()
    timestamp: int = -1
    """CreateTime as received: milliseconds since 1970 if the producer follows the protocol."""

    @property
    def size(self) -> int:
        return len(self.value or b"") + len(self.key or b"") + sum(len(n) + len(v or b"") for n, v in self.headers)

    @property
    def record_position(self) -> RecordPosition:
        return self.stream, self.partition, self.offset

    @property
    def position(self) -> dict[str, Any]:
        return {"topic": self.stream, "partition": self.partition, "offset": self.offset}


@dataclass(frozen=True, slots=True)
class Rules:
    limits: Limits
    fetch: Fetch | None = None
    """Fetches referenced images; without it such records are quarantined."""
    registry: SchemaRegistry | None = None
    end: Callable[[], None] = lambda: None
    kafka: Kafka = field(default_factory=Kafka)
    key: bytes = b""
    """The store's secret, see :mod:`streams.ingest.sources`."""


@dataclass(frozen=True, slots=True)
class Accepted:
    row: StoreRow
    record: Received | None = None
    """The record, for quarantine if its row does not fit the table."""
    replaces: str = ""


def validate(record: Received, rules: Rules) -> Accepted | StoreRow:
    """Decode and check a record. Its content never raises: the result says what is wrong with it. Raises
    RegistryUnavailable in an outage."""
    now = datetime.now(UTC)
    try:
        named = _named_id(record) if record.value is None else None
        if record.value is None and (record.key or named):
            key = record_key(record.key)
            return {"kind": "tombstone", **record.position, "id": named, "key": key, "ingested_at": now}
        sample = decode(
            record.value,
            record.headers,
            max_image_bytes=rules.limits.max_image_bytes,
            fetch=rules.fetch,
            registry=rules.registry,
        )
        return _accept(sample, record, rules, now)
    except RecordError as error:
        return quarantine_row(record, error.reason, str(error), now)
    except (BrokerError, StoreError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # our own faults, or a Rust library's panic, which is not an Exception, must not
        # stop the stream: the record is kept, and can be sent again
        log.exception("record %s:%d at %d could not be validated", record.stream, record.partition, record.offset)
        return quarantine_row(record, "internal", f"{type(error).__name__}: {error}", now)


def quarantine_row(record: Received, reason: str, detail: str, now: datetime | None = None) -> StoreRow:
    """The row of a quarantined record, also used as its message in the quarantine topic."""
    headers = [
        [name.encode(errors="replace").decode(), None if value is None else base64.b64encode(value).decode()]
        for name, value in record.headers
    ]
    return {
        "kind": "quarantine",
        **record.position,
        "reason": reason,
        "detail": detail.encode(errors="replace").decode()[:DETAIL_CHARS],
        "source": (_header(record, "ratchet_source", "ce_source") or "")[:256],
        "ingested_at": now or datetime.now(UTC),
        "key": record_key(record.key),
        "size": len(record.value or b""),
        "original": record.value,
        "original_key": record.key,
        "original_headers": json.dumps(headers),
    }


def record_time(timestamp: int) -> datetime | None:
    """A record's CreateTime; None if absent. Recognizes microseconds and nanoseconds, which are sent by mistake."""
    seconds = timestamp / 1000
    for _ in range(2):
        if seconds > _LATEST_SECONDS:
            seconds /= 1000
    return datetime.fromtimestamp(seconds, UTC) if 0 < seconds <= _LATEST_SECONDS else None


def _accept(sample: Sample, record: Received, rules: Rules, now: datetime) -> Accepted:
    limits = rules.limits
    check_text(sample, DEFAULT_LIMITS.max_text_chars)
    replaces = _replaces(record)
    sent = record_time(record.timestamp) or now
    image = decode_image(sample.image, limits.max_pixels, limits.max_image_bytes, limits.min_side)
    look = perceptual_hash(image)
    signature = (_header(record, signatures.HEADER) or "").encode()
    row = {
        "kind": "sample",
        **sample.row(),
        "id": sample.id,
        "source": source_of(rules.kafka, rules.key, record.stream, sample.source, sample.id, signature),
        "time": sample.time or sent,
        "sent_at": sent,
        "ingested_at": now,
        "look": look.data,
        "words": words_hash(sample.text, sample.question, sample.answer),
        "size": len(sample.image),
        "width": image.width,
        "height": image.height,
        "key": record_key(record.key),
        **record.position,
    }
    return Accepted(row, record, replaces)


def _named_id(record: Received) -> str | None:
    text = _header(record, ID_HEADER)
    if text is None or _ID.fullmatch(text):
        return text
    raise RecordError("headers", f"header {ID_HEADER} is not a sample id.", "It has 64 hex digits, in lower case.")


def _replaces(record: Received) -> str:
    text = _header(record, REPLACES_HEADER) or ""
    if not text or _ID.fullmatch(text) or (text == BY_KEY and record.key):
        return text
    raise RecordError(
        "headers",
        f"header {REPLACES_HEADER} names no sample.",
        f"It is a sample id (64 hex digits, in lower case), or {BY_KEY!r} where the record has a key.",
    )


def _header(record: Received, *wanted: str) -> str | None:
    """The first header that has one of some names and a value."""
    values = (value for name, value in record.headers if name.lower() in wanted and value is not None)
    return next((value.decode(errors="replace") for value in values), None)
