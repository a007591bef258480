"""Decoding of records as Kafka carries them. The encoding is detected per record, so a topic may mix them: the four
that :mod:`ratchet_client.encoding` writes, structured CloudEvents with the image in `data_base64` and fields in
extension attributes, binary ones with the JSON record as value, Confluent's wire format
(:mod:`streams.records.registry`), and Kafka Connect's ``{"schema": ..., "payload": <the record as JSON>}``, as its
JsonConverter writes it.

If a field occurs more than once, a ``ratchet_`` header overrides the record, and the record its event's attributes; of
headers with one name, the last counts. A null means that the field is absent. Unknown fields go into ``extra``.
CloudEvents 1.0 (https://github.com/cloudevents/spec, Kafka protocol binding 1.0) are not read with the official SDK
(``cloudevents`` 2): on hostile input it raises many types of errors, and it adds an ``id`` and a ``time`` to events
without one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Final

from core.errors import RecordError
from ratchet_client.encoding import EVENT_TYPE, NO_SOURCE, PREFIX
from ratchet_client.images import MAX_BYTES, sniff
from ratchet_client.records import METADATA, SCHEMA, Sample, check_schema, make_sample
from streams.records.registry import SchemaRegistry, json_object

Fetch = Callable[[str], bytes]

#: Room for everything in a record except its image: texts, unknown fields, envelopes with their schemas.
FIELDS_BYTES: Final = 512 * 1024
_KNOWN: Final = frozenset({*METADATA, "image", "image_digest", "image_uri", "schema"})
#: Headers that the quarantine topic adds (:mod:`streams.ingest.quarantine`), without their prefix.
_QUARANTINE: Final = frozenset(
    {"reason", "detail", "topic", "partition", "offset", "refused_at", "claim_check", "null_headers"}
)


def decode(
    value: bytes | None,
    headers: Iterable[tuple[str, bytes | None]] = (),
    *,
    max_image_bytes: int = MAX_BYTES,
    fetch: Fetch | None = None,
    registry: SchemaRegistry | None = None,
) -> Sample:
    """Decode a record in any encoding; names of headers are compared without case. Images larger than
    ``max_image_bytes`` are rejected before base64 decoding. Without ``fetch``, records with an ``image_uri`` are
    errors; without ``registry``, those in Confluent's wire format. Any bytes yield a sample, or a RecordError whose
    ``reason`` is one of :data:`ratchet_client.records.REASONS`, or RegistryUnavailable: try the record again."""
    if not value:
        raise RecordError("empty", "the record has no value.", "Send an image or a JSON object.")
    content_type, event, ours = _read_headers(headers)
    attributes = _read_attributes(event) if event else {}
    if sniff(value) or content_type.startswith("image/"):
        return _make(_merge(attributes, ours, {"image": value}), max_image_bytes, fetch)
    if len(value) > _base64_chars(max_image_bytes) + FIELDS_BYTES:
        raise RecordError(
            "image_too_large",
            f"the record has {len(value)} bytes; an image of {max_image_bytes} and its texts take less.",
            "Scale the image down.",
        )
    record = _open_connect(_parse(value) if value[0] else _read_confluent(value, registry))
    if content_type.startswith(EVENT_TYPE) or "specversion" in record:
        attributes, record = _open_structured(record)
    return _make(_merge(attributes, record, ours), max_image_bytes, fetch)


def glimpse(
    value: bytes | None, headers: Iterable[tuple[str, bytes | None]] = (), *, max_image_bytes: int = MAX_BYTES
) -> tuple[bytes | None, dict[str, str]]:
    """The image, if any, and the texts of a record that may be invalid, for showing quarantined records. Never raises.
    The image may be broken."""
    fields: dict[str, Any] = {}
    image: bytes | None = None
    for name, text in headers:
        plain = name.lower().removeprefix(PREFIX).removeprefix("ce_")
        fields[plain] = (text or b"").decode(errors="replace")
    if value and sniff(value):
        image = value if len(value) <= max_image_bytes else None
    elif value:
        with suppress(RecordError):
            record = _open_connect(_parse(value[5:] if value[0] == 0 else value))
            inner = record.get("data")
            fields |= {**record, **(inner if isinstance(inner, dict) else {})}
            image = _from_base64(fields.get("image", fields.get("data_base64")), max_image_bytes)
    texts = {name: text for name in METADATA if isinstance(text := fields.get(name), str) and text}
    return image, {name: text.encode(errors="replace").decode() for name, text in texts.items()}


def _read_headers(headers: Iterable[tuple[str, bytes | None]]) -> tuple[str, dict[str, str], dict[str, str]]:
    """Content type, CloudEvent attributes and fields. Nulls and headers of other systems are skipped."""
    content_type = ""
    event: dict[str, str] = {}
    ours: dict[str, str] = {}
    for name, value in headers:
        lower = name.lower()
        if value is None or not (lower.startswith(("ce_", PREFIX)) or lower == "content-type"):
            continue
        try:
            text = value.decode()
        except UnicodeDecodeError:
            raise RecordError("headers", f"header {name[:80]!r} is not UTF-8.", "Encode it as UTF-8.") from None
        if lower.startswith("ce_"):
            event[lower[3:]] = text
        elif lower.startswith(PREFIX):
            rest = lower[len(PREFIX) :]
            if rest != "replaces":  # an instruction about the record, not a field of it
                ours[rest if rest in _KNOWN else name[len(PREFIX) :]] = text
        else:
            content_type = text.strip().lower()
    return content_type, event, _without_quarantine(ours)


def _without_quarantine(ours: dict[str, str]) -> dict[str, str]:
    """Drop the headers of a record that was read from the quarantine topic and sent again unchanged."""
    for name in ("image", "image_uri"):
        if name in ours:
            raise RecordError("headers", f"header {PREFIX}{name}: a header has no room for it.", "Put it in the value.")
    if ours.keys() >= {"reason", "refused_at", "offset"}:
        return {name: text for name, text in ours.items() if name not in _QUARANTINE}
    return ours


def _merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge a record's fields; later layers override earlier ones, and unknown fields go under ``extra``."""
    known: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            if name == "extra" and isinstance(opened := _opened(value), dict):
                extra |= opened
            elif name == "extra" or name not in _KNOWN:
                extra[name] = value
            elif value is not None:
                known[name] = value
    return {**known, "extra": extra} if extra else known


def _opened(value: Any) -> Any:
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _read_confluent(value: bytes, registry: SchemaRegistry | None) -> dict[str, Any]:
    if registry is None:
        raise RecordError(
            "schema",
            "the record begins with a zero byte, as in Confluent's wire format, and no schema registry is set.",
            "Set `kafka.schema_registry`, or send JSON.",
        )
    return registry.read(value)


def _open_connect(record: dict[str, Any]) -> dict[str, Any]:
    """The payload of Kafka Connect's envelope; other records unchanged."""
    if record.keys() != {"schema", "payload"} or not isinstance(record["schema"], (dict, type(None))):
        return record
    payload = record["payload"]
    if isinstance(payload, str) and (record["schema"] or {}).get("type") == "bytes":
        return {"image": payload}
    if not isinstance(payload, dict):
        kind = type(payload).__name__
        raise RecordError("schema", f"`payload` of the Kafka Connect record is a {kind}.", "Send a struct or a map.")
    return payload


def _parse(value: bytes) -> dict[str, Any]:
    fix = "Send the bytes of a PNG, JPEG, WebP, GIF or BMP file, or a JSON object in UTF-8."
    return json_object(value, "the record is neither an image nor JSON", fix)


def _make(fields: dict[str, Any], max_image_bytes: int, fetch: Fetch | None) -> Sample:
    check_schema(fields.pop("schema", SCHEMA))
    digest = fields.pop("image_digest", None)
    algorithm, stated = _parse_digest(digest) if digest is not None else ("", "")  # before anything is fetched
    uri = fields.pop("image_uri", None)
    if uri is not None and fields.get("image"):
        raise RecordError("schema", "the record has both `image` and `image_uri`.", "Keep one of them.")
    if uri is not None:
        if not isinstance(uri, str):
            raise RecordError("schema", "`image_uri` is not a string.", "Give one URI.")
        if fetch is None:
            raise RecordError("uri_not_allowed", "images are not fetched here.", "Send the image itself.")
        fields["image"] = fetch(uri)
    elif fields.get("image") and not isinstance(fields["image"], bytes):
        fields["image"] = _from_base64(fields["image"], max_image_bytes)
    if algorithm and fields.get("image"):
        actual = hashlib.new(algorithm, fields["image"]).hexdigest()
        if actual != stated:
            raise RecordError(
                "uri_digest",
                f"the image has the {algorithm} {actual[:12]}..., the record states {algorithm}:{stated[:12]}....",
                "State the digest of the encoded image as it is sent or stored, or send the record again.",
            )
    return make_sample(fields)


def _base64_chars(size: int) -> int:
    """Base64 length of ``size`` bytes, with room for a line break every 76 characters."""
    return 4 * (size + 3) // 3 + size // 16 + 4


def _from_base64(text: Any, max_bytes: int) -> bytes:
    if not isinstance(text, str):
        raise RecordError("schema", f"`image` is a {type(text).__name__}.", "Give base64 text.")
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise RecordError("image_undecodable", "`image` is a data: URI without base64.", "Use base64.")
    if len(text) > _base64_chars(max_bytes):
        raise RecordError("image_too_large", f"the image has more than {max_bytes} bytes.", "Scale it down.")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RecordError(
            "image_undecodable", f"`image` is not base64: {error}.", "Encode the file as base64."
        ) from None


#: Envelope attributes that say nothing about the sample, unlike ``source``, ``time`` and ``subject``.
_ENVELOPE: Final = frozenset({"specversion", "type", "id", "datacontenttype", "dataschema", "data", "data_base64"})


def _read_attributes(event: Mapping[str, Any]) -> dict[str, Any]:
    """Fields from an event's attributes: ``source``, ``time``, ``subject`` and every extension. Raises RecordError
    ``schema`` if a required attribute is missing, or the event is of another type."""
    for name in ("specversion", "type", "source", "id"):
        if not event.get(name):
            raise RecordError("schema", f"the CloudEvent has no `{name}`.", "It is required by CloudEvents.")
    if event["specversion"] != "1.0":
        got = f"specversion {str(event['specversion'])[:20]!r}"
        raise RecordError("schema", f"the CloudEvent has {got}.", "Expected is specversion '1.0'.")
    check_schema(event["type"])
    fields = {name: value for name, value in event.items() if name not in _ENVELOPE}
    if fields["source"] == NO_SOURCE:
        del fields["source"]
    return fields


def _open_structured(event: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields from the attributes, and the record in ``data`` (or the image in ``data_base64``) of a structured event.
    Raises RecordError ``schema``."""
    fields = _read_attributes(event)
    if "data_base64" in event:
        return fields, {"image": event["data_base64"]}
    data = event.get("data")
    if not isinstance(data, dict):
        raise RecordError(
            "schema", "`data` of the CloudEvent is no JSON object.", "Put the record there, or use data_base64."
        )
    return fields, data


#: Image digests in the form of OCI descriptors: ``sha256:<hex>``.
_DIGEST_FORMS: Final = {"sha256": re.compile("[0-9a-f]{64}"), "sha512": re.compile("[0-9a-f]{128}")}


def _parse_digest(text: object) -> tuple[str, str]:
    """Algorithm and lower-case hex digits of a digest. Raises RecordError ``schema`` if it is unknown."""
    algorithm, _, digits = text.lower().partition(":") if isinstance(text, str) else ("", "", "")
    form = _DIGEST_FORMS.get(algorithm)
    if form is None or not form.fullmatch(digits):
        raise RecordError(
            "schema",
            f"`image_digest` {str(text)[:80]!r} is not a known digest.",
            "Give sha256:<64 hex digits> or sha512:<128 hex digits> of the encoded image.",
        )
    return algorithm, digits
