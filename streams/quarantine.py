"""The quarantine topic: every refused record, as it came, with the reason and where it was.

A message has the original key, value and headers, and besides

    ratchet_reason      one of ratchet_client.records.REASONS
    ratchet_detail      the reason in words
    ratchet_topic, ratchet_partition, ratchet_offset      position of the original (topic@n: n-th log of that name)
    ratchet_refused_at  UTC, ISO 8601
    ratchet_null_headers    a JSON list of the names of its headers without a value; only where it had some. They are
                            left out, as kafka-python writes no header without a value, and an empty one is another

so that a corrected record can be sent again as it is. What the topic does not take for its size is a *claim check*: the
same without the original's key, value and headers, which stay in the sample store, with

    ratchet_claim_check   where its bytes are: the position for `ratchet samples show` and `GET /admin/v1/quarantine`
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from ratchet_client.encoding import Encoded, Headers
from streams.rows import RecordPosition, name_of, position_of

RefusalRow = Mapping[str, Any]


def message(row: RefusalRow) -> Encoded:
    """What is published for a refused record's row."""
    record = original(row)
    # Brokers take a record with neither key nor value; the client does not send one.
    value = b"" if record.value is None and record.key is None else record.value
    nulls = [name for name, value in json.loads(row["original_headers"]) if value is None]
    named: Headers = [("ratchet_null_headers", json.dumps(nulls).encode())] if nulls else []
    return Encoded(record.key, value, [*record.headers, *_headers(row), *named])


def claim_check(row: RefusalRow) -> Encoded:
    """What is published for a row whose record the topic does not take."""
    size = len(row["original"] or b"")
    text = json.dumps({"record": name_of(position_of(row)), "reason": row["reason"], "bytes": size})
    check = ("ratchet_claim_check", name_of(position_of(row)).encode())
    return Encoded(None, text.encode(), [*_headers(row), check])


def original(row: RefusalRow) -> Encoded:
    """The record of a refused record's row, as it came but for headers without a value, which ingest passes over."""
    headers = [
        (name, base64.b64decode(value)) for name, value in json.loads(row["original_headers"]) if value is not None
    ]
    return Encoded(row["original_key"], row["original"], headers)


def refused_position(record: Any) -> RecordPosition | None:
    """Where the original of a message in the topic was; None for a message that is none of ours."""
    headers = dict(record.headers)
    try:
        stream = headers["ratchet_topic"].decode()
        return stream, int(headers["ratchet_partition"]), int(headers["ratchet_offset"])
    except (KeyError, ValueError, AttributeError):
        return None


def _headers(row: RefusalRow) -> Headers:
    refused_at: datetime = row["ingested_at"]
    ours = {
        "reason": row["reason"],
        "detail": row["detail"],
        "topic": row["topic"],
        "partition": str(row["partition"]),
        "offset": str(row["offset"]),
        "refused_at": refused_at.isoformat(),
    }
    return [(f"ratchet_{name}", text.encode()) for name, text in ours.items()]
