"""Reads the CloudEvents 1.0 that samples come in: https://github.com/cloudevents/spec, Kafka protocol binding 1.0.

The official SDK (``cloudevents`` 2) writes the events that the tests read, and is not used to read them: it is made for
events of its own side. On input from outside it raises AttributeError, TypeError, KeyError or UnicodeDecodeError beside
its own errors, takes headers as a dictionary, sets an ``id`` and a ``time`` where an event has none, and decodes the
whole value as text first, which here is an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from core.errors import RecordError
from ratchet_client.encoding import NO_SOURCE
from ratchet_client.records import check_schema

_REQUIRED: Final = ("specversion", "type", "source", "id")
#: Attributes of the envelope that say nothing about the sample. ``source``, ``time`` and ``subject`` do.
_ENVELOPE: Final = frozenset({"specversion", "type", "id", "datacontenttype", "dataschema", "data", "data_base64"})


def read_attributes(event: Mapping[str, Any]) -> dict[str, Any]:
    """Fields from the attributes of an event: ``source``, ``time``, ``subject`` and every extension, known or not.

    Raises:
        RecordError: ``schema``: a required attribute is missing, or the event is of another type.
    """
    for name in _REQUIRED:
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


def open_structured(event: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields from the attributes, and the record in ``data`` (or the image in ``data_base64``) of a structured event.

    Raises:
        RecordError: ``schema``.
    """
    fields = read_attributes(event)
    if "data_base64" in event:
        return fields, {"image": event["data_base64"]}
    data = event.get("data")
    if not isinstance(data, dict):
        raise RecordError(
            "schema", "`data` of the CloudEvent is no JSON object.", "Put the record there, or use data_base64."
        )
    return fields, data
