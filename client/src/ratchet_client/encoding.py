"""Records as a producer writes them, in one of four encodings.

    json                 {"text": "a red boat", "image": "<base64>", ...}; no header is needed
    raw                  the image's bytes; the other fields in headers: ratchet_text, ratchet_domain, ...
    cloudevents          CloudEvents 1.0 structured: an event in JSON whose `data` is the record as above
    cloudevents-binary   CloudEvents 1.0 binary: ce_specversion, ce_type, ce_source, ce_id, ...; the value is the
                         image, the fields are in ce_text, ce_domain, ...

A reader tells them apart by the record itself, so that a topic may mix them.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any, Final, Literal

from ratchet_client.extra import dump_extra
from ratchet_client.images import CONTENT_TYPES, sniff
from ratchet_client.records import SCHEMA, Sample

Encoding = Literal["json", "raw", "cloudevents", "cloudevents-binary"]
Headers = list[tuple[str, bytes]]

PREFIX: Final = "ratchet_"
"""Of the headers that hold fields."""
EVENT_TYPE: Final = "application/cloudevents+json"
"""Content type of a structured CloudEvent."""
NO_SOURCE: Final = "urn:ratchet:unknown"
"""CloudEvents demands a source; this one stands for none."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Key, value and headers of a Kafka record. A sample's key is its id, so equal samples share a partition."""

    key: bytes | None
    value: bytes | None
    headers: Headers


def encode(sample: Sample, encoding: Encoding = "raw", replaces: str = "") -> Encoded:
    """Write ``sample`` in one of the four encodings. ``raw`` is the smallest.

    Args:
        replaces: the id of a sample that this one corrects.
    """
    record = _encode(sample, encoding)
    if replaces:
        record.headers.append((f"{PREFIX}replaces", replaces.encode()))
    return record


def _encode(sample: Sample, encoding: Encoding) -> Encoded:
    key = sample.id.encode()
    kind = CONTENT_TYPES.get(sniff(sample.image) or "", "application/octet-stream")
    match encoding:
        case "json":
            return Encoded(key, _json(_record(sample)), [("content-type", b"application/json")])
        case "raw":
            headers = [(f"{PREFIX}{name}", text.encode()) for name, text in _strings(sample).items()]
            return Encoded(key, sample.image, [("content-type", kind.encode()), *headers])
        case "cloudevents":
            event = {**_envelope(sample), "datacontenttype": "application/json", "data": _record(sample)}
            return Encoded(key, _json(event), [("content-type", EVENT_TYPE.encode())])
        case "cloudevents-binary":
            attributes = {**_strings(sample), **_envelope(sample)}
            headers = [(f"ce_{name}", text.encode()) for name, text in attributes.items()]
            return Encoded(key, sample.image, [("content-type", kind.encode()), *headers])


def _envelope(sample: Sample) -> dict[str, str]:
    """The attributes that CloudEvents demands."""
    return {"specversion": "1.0", "type": SCHEMA, "id": sample.id, "source": sample.source or NO_SOURCE}


def _record(sample: Sample) -> dict[str, Any]:
    return {"schema": SCHEMA, **sample.metadata(), "image": base64.b64encode(sample.image).decode()}


def _strings(sample: Sample) -> dict[str, str]:
    written = {"tags": ";".join(sample.tags), "extra": dump_extra(sample.extra)}
    return {name: written.get(name, value) for name, value in sample.metadata().items()}


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
