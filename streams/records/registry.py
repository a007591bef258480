"""Records in Confluent's wire format: a zero byte, a schema ID (4 bytes, big-endian), then Avro, Protobuf or JSON, from
any registry with Confluent's REST API.
https://docs.confluent.io/platform/current/schema-registry/fundamentals/serdes-develop/index.html#wire-format

The official client is not used: it brings some twenty packages, and lets errors of many libraries through. JSON values
are not validated against their JSON Schema: :mod:`ratchet_client.records` checks samples.

A registry that does not answer, or answers with an error of its own, is an outage
(:class:`~core.errors.RegistryUnavailable`), and ingest waits. Unknown IDs, unusable schemas and values that do not fit
them send the record to quarantine (reason ``schema``). If the registry answers but fails for one schema, ingest waits
for :data:`DEADLINE_SECONDS`; then the reason is ``schema_unavailable``.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from core.errors import ConfigError, RecordError, RegistryUnavailable, SchemaUnavailable
from core.settings.streams import Kafka
from streams.records.registry_client import TIMEOUT_SECONDS, RegistryClient, Schema

Decoder = Callable[[bytes], dict[str, Any]]

MAX_SCHEMAS: Final = 512
REFUSED_SECONDS: Final = 30.0
"""Time before a missing or unusable schema is requested again: it may be registered late."""
AWAY_SECONDS: Final = 1.0
"""Time before an unreachable registry is asked again: threads do not wait for its timeouts one by one."""
DEADLINE_SECONDS: Final = 600.0
"""Longest wait for a schema while the registry answers: longer than a restart or deployment of the registry takes."""
FORGET_SECONDS: Final = 120.0
"""A failure after this time without one counts as the first: the consumer retries at least every ten seconds."""


Refusal = tuple[RecordError, float]
"""Why a schema cannot be used, and until when that counts."""


class SchemaRegistry:
    """Reads records whose schemas a registry has. Thread safe."""

    def __init__(self, url: str, auth: str | None = None, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        """Sends no request before the first record. ``auth``: ``user:password``. Raises ConfigError if the extra
        ``registry`` is not installed."""
        try:
            import fastavro  # noqa: F401
            import google.protobuf  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"kafka.schema_registry needs a package that is not installed ({error.name}).",
                "Install `ratchet-server[registry]`.",
            ) from None
        self.client = RegistryClient(url, auth, timeout_seconds=timeout_seconds)
        self._decoders: dict[int, Decoder | Refusal] = {}
        self._failing: dict[int, tuple[float, float]] = {}
        self._away: tuple[RegistryUnavailable, float] | None = None
        self._making = threading.Lock()

    @classmethod
    def of(cls, kafka: Kafka) -> SchemaRegistry | None:
        auth = kafka.schema_registry_auth
        return cls(kafka.schema_registry, auth.get_secret_value() if auth else None) if kafka.schema_registry else None

    def read(self, value: bytes) -> dict[str, Any]:
        """Decode a record's fields; ``image`` may be bytes, or base64 text as in JSON. Raises RecordError with the
        reason ``schema``, ``not_json`` for a JSON value, or ``schema_unavailable`` if the registry has failed for this
        schema for too long; RegistryUnavailable if it is unreachable."""
        if len(value) < 6 or value[0] != 0:
            raise RecordError(
                "schema", "the value ends before its schema id does.", "Send Confluent's wire format, or JSON."
            )
        return self._decoder(int.from_bytes(value[1:5], "big"))(value[5:])

    def close(self) -> None:
        self.client.close()

    def _decoder(self, number: int) -> Decoder:
        decoder = self._decoders.get(number)
        if decoder is None or isinstance(decoder, tuple):
            with self._making:  # one thread asks, the others use its result
                decoder = self._decoders.get(number)
                if decoder is None or (isinstance(decoder, tuple) and time.monotonic() > decoder[1]):
                    if len(self._decoders) >= MAX_SCHEMAS:
                        self._decoders.clear()
                    decoder = self._decoders[number] = self._make(number)
        if isinstance(decoder, tuple):
            error, _ = decoder
            raise RecordError(error.reason, error.message, error.fix)
        return decoder

    def _make(self, number: int) -> Decoder | Refusal:
        now = time.monotonic()
        if self._away is not None and now < self._away[1]:
            error = self._away[0]
            raise RegistryUnavailable(error.message, error.fix)
        try:
            decoder: Decoder | Refusal = make_decoder(self.client.by_id(number), self.client)
        except RecordError as error:
            decoder = error, now + REFUSED_SECONDS
        except RegistryUnavailable as error:
            if not self._given_up(number, error, now):
                self._away = (error, now + AWAY_SECONDS)
                raise
            fix = "When the registry has it again, send the record once more (`ratchet quarantine resubmit`)."
            decoder = RecordError("schema_unavailable", error.message, fix), now + REFUSED_SECONDS
        else:
            self._failing.pop(number, None)
        return decoder

    def _given_up(self, number: int, error: RegistryUnavailable, now: float) -> bool:
        """Count a failure; True if the registry has answered, but not with this schema, for the whole deadline."""
        since, last = self._failing.get(number, (now, now))
        if now - last > FORGET_SECONDS:
            since = now
        if len(self._failing) >= MAX_SCHEMAS:
            self._failing.clear()
        self._failing[number] = since, now
        return isinstance(error, SchemaUnavailable) and now - since >= DEADLINE_SECONDS


def make_decoder(schema: Schema, client: RegistryClient) -> Decoder:
    """The decoder for a schema. Raises RecordError ``schema`` if it, or an import, cannot be used; RegistryUnavailable
    if an import could not be fetched."""
    if schema.kind == "JSON":
        return lambda value: json_object(value, "the value is no JSON", "Its schema in the registry says JSON.")
    from streams.records.registry_formats import avro_decoder, protobuf_decoder  # only with the extra

    return avro_decoder(schema, client) if schema.kind == "AVRO" else protobuf_decoder(schema, client)


def json_object(value: bytes, problem: str, fix: str) -> dict[str, Any]:
    """Parse a JSON object. Raises RecordError ``not_json``; with ``problem`` and ``fix`` if it is no JSON at all."""
    try:
        record = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RecordError("not_json", f"{problem}: {str(error)[:120]}.", fix) from None
    if not isinstance(record, dict):
        raise RecordError("not_json", f"the record is a JSON {type(record).__name__}.", "Send a JSON object.")
    return record
