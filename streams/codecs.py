"""Records as Kafka carries them.

Four encodings, told apart by the record itself, so that a topic may mix them:

    json                 {"text": "a red boat", "image": "<base64>", ...}; no header is needed
    raw                  the image's bytes; the other fields in headers: ratchet_text, ratchet_domain, ...
    cloudevents          CloudEvents 1.0 structured: an event in JSON whose `data` is the record as above
                         (or whose `data_base64` is the image, and whose extension attributes are the fields)
    cloudevents-binary   CloudEvents 1.0 binary: ce_specversion, ce_type, ce_source, ce_id, ...; the value is the
                         image (fields in ce_text, ce_domain, ...) or the JSON record, as content-type says

CloudEvents: https://github.com/cloudevents/spec, Kafka protocol binding 1.0.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from ops.errors import RecordError
from streams.image_digests import check_digest, parse_digest
from streams.images import CONTENT_TYPES, MAX_BYTES, sniff
from streams.records import METADATA, SCHEMA, Sample, make_sample

Encoding = Literal["json", "raw", "cloudevents", "cloudevents-binary"]
Headers = list[tuple[str, bytes]]
Fetch = Callable[[str], bytes]

CLOUDEVENTS_JSON = "application/cloudevents+json"
NO_SOURCE = "urn:ratchet:unknown"  # CloudEvents demands a source; this one stands for none


@dataclass(frozen=True, slots=True)
class Encoded:
    """Key, value and headers of a Kafka record. A sample's key is its id, so equal samples share a partition."""

    key: bytes | None
    value: bytes | None
    headers: Headers


def encode(sample: Sample, encoding: Encoding = "raw") -> Encoded:
    """Write ``sample`` in one of the four encodings. ``raw`` is the smallest."""
    key = sample.id.encode()
    kind = CONTENT_TYPES.get(sniff(sample.image) or "", "application/octet-stream")
    match encoding:
        case "json":
            return Encoded(key, _json(_record(sample)), [("content-type", b"application/json")])
        case "raw":
            headers = [(f"ratchet_{name}", text.encode()) for name, text in _strings(sample).items()]
            return Encoded(key, sample.image, [("content-type", kind.encode()), *headers])
        case "cloudevents":
            event = {**_envelope(sample), "datacontenttype": "application/json", "data": _record(sample)}
            return Encoded(key, _json(event), [("content-type", CLOUDEVENTS_JSON.encode())])
        case "cloudevents-binary":
            attributes = {**_strings(sample), **_envelope(sample)}
            headers = [(f"ce_{name}", text.encode()) for name, text in attributes.items()]
            return Encoded(key, sample.image, [("content-type", kind.encode()), *headers])


def decode(
    value: bytes | None,
    headers: Iterable[tuple[str, bytes | None]] = (),
    *,
    max_image_bytes: int = MAX_BYTES,
    fetch: Fetch | None = None,
) -> Sample:
    """Read a record in any of the encodings.

    Args:
        value: the record's value.
        headers: its headers; names are compared without case.
        max_image_bytes: a larger image is refused before it is decoded from base64.
        fetch: gets the bytes of an ``image_uri``; without it such records are refused.

    Raises:
        RecordError: ``reason`` is one of :data:`streams.records.REASONS`.
    """
    if not value:
        raise RecordError("empty", "the record has no value.", "Send an image or a JSON object.")
    attributes = _read_headers(headers)
    content_type = attributes.get("content-type", "")
    ours = _prefixed(attributes, "ratchet_")
    event = _prefixed(attributes, "ce_")
    if sniff(value) or content_type.startswith("image/"):
        fields = {**_from_event(event), **_only_known(ours, "header ratchet_")}
        return make_sample({**fields, "image": value})
    record = _parse(value)
    if content_type.startswith(CLOUDEVENTS_JSON) or "specversion" in record:
        record = _open_event(record)
    elif event:
        envelope = _from_event(event)
        record = {**{name: envelope[name] for name in ("source", "time") if name in envelope}, **record}
    return _from_record({**record, **_only_known(ours, "header ratchet_")}, max_image_bytes, fetch)


def glimpse(
    value: bytes | None, headers: Iterable[tuple[str, bytes | None]] = (), *, max_image_bytes: int = MAX_BYTES
) -> tuple[bytes | None, dict[str, str]]:
    """What can be made out of a record that may be no valid one: its image, if it carries one, and its texts.

    Never raises; for showing refused records to people. The image may be broken, or none at all.
    """
    fields: dict[str, Any] = {}
    image: bytes | None = None
    for name, text in headers:
        plain = name.lower().removeprefix("ratchet_").removeprefix("ce_")
        fields[plain] = (text or b"").decode(errors="replace")
    if value and sniff(value):
        image = value if len(value) <= max_image_bytes else None
    elif value:
        with suppress(RecordError):
            record = _parse(value)
            inner = record.get("data")
            fields |= {**record, **(inner if isinstance(inner, dict) else {})}
            image = _from_base64(fields.get("image", fields.get("data_base64")), max_image_bytes)
    return image, {name: text for name in METADATA if isinstance(text := fields.get(name), str) and text}


def _record(sample: Sample) -> dict[str, Any]:
    fields = sample.model_dump(mode="json", exclude={"image"}, exclude_defaults=True)
    return {"schema": SCHEMA, **fields, "image": base64.b64encode(sample.image).decode()}


def _strings(sample: Sample) -> dict[str, str]:
    fields = sample.model_dump(mode="json", exclude={"image"}, exclude_defaults=True)
    return {name: ";".join(value) if name == "tags" else value for name, value in fields.items()}


def _envelope(sample: Sample) -> dict[str, str]:
    return {"specversion": "1.0", "type": SCHEMA, "id": sample.id, "source": sample.source or NO_SOURCE}


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _read_headers(headers: Iterable[tuple[str, bytes | None]]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for name, value in headers:
        lower = name.lower()
        if value is None or not (lower.startswith(("ce_", "ratchet_")) or lower == "content-type"):
            continue  # headers of other systems are none of our business
        try:
            texts[lower] = value.decode()
        except UnicodeDecodeError:
            raise RecordError("headers", f"header {name!r} is not UTF-8.", "Encode it as UTF-8.") from None
    return texts


def _prefixed(attributes: dict[str, str], prefix: str) -> dict[str, str]:
    return {name[len(prefix) :]: text for name, text in attributes.items() if name.startswith(prefix)}


def _only_known(fields: dict[str, str], what: str) -> dict[str, str]:
    for name in fields:
        if name not in METADATA:
            raise RecordError(
                "headers", f"{what}{name} is no field of {SCHEMA}.", f"Fields are: {', '.join(METADATA)}."
            )
    return fields


def _from_event(event: dict[str, Any]) -> dict[str, Any]:
    """Fields of a sample from the attributes of a CloudEvent; extensions that are not ours are passed over."""
    if not event:
        return {}
    for name in ("specversion", "type", "source", "id"):
        if not event.get(name):
            raise RecordError("schema", f"the CloudEvent has no `{name}`.", "It is required by CloudEvents.")
    if event["specversion"] != "1.0" or event["type"] != SCHEMA:
        got = f"specversion {event['specversion']!r}, type {event['type']!r}"
        raise RecordError("schema", f"the CloudEvent has {got}.", f"Expected are specversion '1.0', type '{SCHEMA}'.")
    fields = {name: event[name] for name in METADATA if event.get(name) is not None}
    if fields["source"] == NO_SOURCE:
        del fields["source"]
    return fields


def _open_event(event: dict[str, Any]) -> dict[str, Any]:
    fields = _from_event(event)
    if "data_base64" in event:
        return {**fields, "image": event["data_base64"]}
    data = event.get("data")
    if not isinstance(data, dict):
        raise RecordError(
            "schema", "`data` of the CloudEvent is no JSON object.", "Put the record there, or use data_base64."
        )
    return {**{name: fields[name] for name in ("source", "time") if name in fields}, **data}


def _parse(value: bytes) -> dict[str, Any]:
    try:
        record = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RecordError(
            "not_json",
            f"the record is neither an image nor JSON: {str(error)[:120]}.",
            "Send the bytes of a PNG, JPEG, WebP, GIF or BMP file, or a JSON object in UTF-8.",
        ) from None
    if not isinstance(record, dict):
        raise RecordError("not_json", f"the record is a JSON {type(record).__name__}.", "Send a JSON object.")
    return record


def _from_record(record: dict[str, Any], max_image_bytes: int, fetch: Fetch | None) -> Sample:
    fields = dict(record)
    schema = fields.pop("schema", SCHEMA)
    if schema != SCHEMA:
        raise RecordError("schema", f"schema {str(schema)[:80]!r} is not known.", f"Use {SCHEMA!r}.")
    digest = fields.pop("image_digest", None)
    if digest is not None:
        parse_digest(digest)  # before anything is fetched
    uri = fields.pop("image_uri", None)
    if uri is not None and fields.get("image"):
        raise RecordError("schema", "the record has both `image` and `image_uri`.", "Keep one of them.")
    if uri is not None:
        if not isinstance(uri, str):
            raise RecordError("schema", "`image_uri` is not a string.", "Give one URI.")
        if fetch is None:
            raise RecordError("uri_not_allowed", "images are not fetched here.", "Send the image itself.")
        fields["image"] = fetch(uri)
    elif fields.get("image"):
        fields["image"] = _from_base64(fields["image"], max_image_bytes)
    if digest is not None and fields.get("image"):
        check_digest(fields["image"], digest)
    return make_sample(fields)


def _from_base64(text: Any, max_bytes: int) -> bytes:
    if not isinstance(text, str):
        raise RecordError("schema", f"`image` is a {type(text).__name__}.", "Give base64 text.")
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise RecordError("image_undecodable", "`image` is a data: URI without base64.", "Use base64.")
    if len(text) > 4 * (max_bytes + 3) // 3 + max_bytes // 16 + 4:  # room for a line break every 76 characters
        raise RecordError("image_too_large", f"the image has more than {max_bytes} bytes.", "Scale it down.")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RecordError(
            "image_undecodable", f"`image` is not base64: {error}.", "Encode the file as base64."
        ) from None
