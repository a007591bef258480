"""One record from outside: is it a sample?"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from ops.errors import RecordError
from ops.settings import Ingest as Limits
from streams import uris
from streams.codecs import decode
from streams.images import decode_image
from streams.quality.duplicates import Words, phash
from streams.quality.split import split_of
from streams.records import Sample, check_text

log = logging.getLogger(__name__)
DETAIL_CHARS = 500


@dataclass(frozen=True, slots=True)
class Received:
    """A record as it came from Kafka. ``stream`` is the topic with its generation."""

    stream: str
    partition: int
    offset: int
    value: bytes | None
    key: bytes | None = None
    headers: Sequence[tuple[str, bytes | None]] = ()
    timestamp: datetime | None = None

    @property
    def size(self) -> int:
        """Bytes that it takes in a batch."""
        return len(self.value or b"") + len(self.key or b"") + sum(len(n) + len(v or b"") for n, v in self.headers)

    @property
    def position(self) -> dict[str, Any]:
        """The columns that tell where it is from."""
        return {"topic": self.stream, "partition": self.partition, "offset": self.offset}


@dataclass(frozen=True, slots=True)
class Accepted:
    """A valid sample: its row in the store, and what it is compared with others by."""

    row: dict[str, Any]
    words: Words

    def duplicate(self, kind: str, of: str) -> dict[str, Any]:
        """The row to store instead when it repeats the sample ``of``."""
        keep = {name: self.row[name] for name in ("id", "topic", "partition", "offset", "ingested_at")}
        return {**keep, "kind": "duplicate", "reason": f"duplicate_{kind}", "duplicate_of": of}


@dataclass(frozen=True, slots=True)
class Refused:
    """A record that is no sample: its row, which is also the message to the quarantine topic."""

    row: dict[str, Any]
    reason: str


def judge(record: Received, limits: Limits) -> Accepted | Refused:
    """Decode and check one record. Never raises for what the record holds: the outcome says what is wrong with it."""
    now = datetime.now(UTC)
    try:
        fetch = partial(
            uris.fetch, allowed=limits.allowed_uris, max_bytes=limits.max_image_bytes, networks=limits.allowed_networks
        )
        sample = decode(record.value, record.headers, max_image_bytes=limits.max_image_bytes, fetch=fetch)
        return _accept(sample, record, limits, now)
    except RecordError as error:
        return _refuse(record, error.reason, str(error), now)
    except Exception as error:  # a fault of ours must not stop the stream: the record is kept, and can be replayed
        log.exception("record %s:%d at %d could not be judged", record.stream, record.partition, record.offset)
        return _refuse(record, "internal", f"{type(error).__name__}: {error}", now)


def _accept(sample: Sample, record: Received, limits: Limits, now: datetime) -> Accepted:
    check_text(sample, limits.max_text_chars)
    image = decode_image(sample.image, limits.max_pixels, limits.max_image_bytes, limits.min_side)
    row = {
        "kind": "sample",
        **sample.model_dump(),
        "id": sample.id,
        "tags": list(sample.tags),
        "time": sample.time or record.timestamp or now,
        "ingested_at": now,
        "split": split_of(sample.image, limits.fresh_eval_share),
        "phash": phash(image),
        "width": image.width,
        "height": image.height,
        **record.position,
    }
    return Accepted(row, (sample.text, sample.question, sample.answer))


def _refuse(record: Received, reason: str, detail: str, now: datetime) -> Refused:
    headers = [[name, None if value is None else base64.b64encode(value).decode()] for name, value in record.headers]
    row = {
        "kind": "quarantine",
        **record.position,
        "reason": reason,
        "detail": detail.encode(errors="replace").decode()[:DETAIL_CHARS],
        "ingested_at": now,
        "original": record.value,
        "original_key": record.key,
        "original_headers": json.dumps(headers),
    }
    return Refused(row, reason)
