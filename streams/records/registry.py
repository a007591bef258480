"""Records in Confluent's wire format: a zero byte, a schema id (4 bytes, big-endian), then Avro, Protobuf or JSON.

https://docs.confluent.io/platform/current/schema-registry/fundamentals/serdes-develop/index.html#wire-format

The registry is any with Confluent's REST API: Confluent, Redpanda, Karapace, Apicurio (ccompat). Avro and Protobuf are
read by :mod:`streams.records.registry_formats`, with the extra ``ratchet-server[registry]``. The official client is not
used: it brings some twenty packages, and lets errors of many libraries through. A JSON value is not validated against
its JSON Schema: :mod:`ratchet_client.records` checks what a sample must be.

**Outage or quarantine.** A registry that does not answer, or answers with an error of its own, is an outage
(:class:`~core.errors.RegistryUnavailable`): nothing is known about the record, so ingest waits. An id that the registry
does not have, a schema that cannot be used, and a value that does not fit it send the record to quarantine (reason
``schema``). A schema at which the registry fails while it answers is waited for, too, but only for
:data:`DEADLINE_SECONDS`: then the reason is ``schema_unavailable``.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from core.errors import ConfigError, RecordError, RegistryUnavailable, SchemaUnavailable
from core.settings.streams import Kafka
from streams.records.registry_client import TIMEOUT_SECONDS, RegistryClient, Schema

Decoder = Callable[[bytes], dict[str, Any]]

MAX_SCHEMAS: Final = 512
"""Schemas whose decoders, and failures, are kept."""
REFUSED_SECONDS: Final = 30.0
"""Time for which a schema that is not there, or not usable, is not asked for again: it may be registered late."""
AWAY_SECONDS: Final = 1.0
"""Time for which a registry that was away is not asked again: threads do not all wait for its timeouts in turn."""
DEADLINE_SECONDS: Final = 600.0
"""A schema holds up its partition for so long while the registry answers, but not with it: longer than a restart or a
deployment of the registry takes."""
FORGET_SECONDS: Final = 120.0
"""A failure after so long without one is the first: the consumer tries again every ten seconds at the latest."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    error: RecordError
    until: float


class SchemaRegistry:
    """Reads records whose schemas a registry has. Thread safe.

    >>> registry = SchemaRegistry.of(settings.kafka)
    >>> sample = decode(record.value, record.headers, registry=registry)
    """

    def __init__(self, url: str, auth: str | None = None, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        """Nothing is asked before the first record. ``auth``: ``user:password``.

        Raises:
            ConfigError: the extra ``registry`` is not installed.
        """
        try:
            import fastavro  # noqa: F401
            import google.protobuf  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"kafka.schema_registry needs a package that is not installed ({error.name}).",
                "Install `ratchet-server[registry]`.",
            ) from None
        self.client = RegistryClient(url, auth, timeout_seconds=timeout_seconds)
        self._decoders: dict[int, Decoder | _Refusal] = {}
        self._failing: dict[int, tuple[float, float]] = {}
        """When a schema failed first and last, by its id."""
        self._away: tuple[RegistryUnavailable, float] | None = None
        self._making = threading.Lock()

    @classmethod
    def of(cls, kafka: Kafka) -> SchemaRegistry | None:
        """The registry of the settings, or None where none is set."""
        auth = kafka.schema_registry_auth
        return cls(kafka.schema_registry, auth.get_secret_value() if auth else None) if kafka.schema_registry else None

    def read(self, value: bytes) -> dict[str, Any]:
        """Fields of a record; ``image`` may be bytes, or base64 text as in JSON.

        Raises:
            RecordError: ``schema``; of a JSON value ``not_json``; ``schema_unavailable``: the registry has failed at
                the schema for too long.
            RegistryUnavailable: the registry is away.
        """
        if len(value) < 6 or value[0] != 0:
            raise RecordError(
                "schema", "the value ends before its schema id does.", "Send Confluent's wire format, or JSON."
            )
        return self._decoder(int.from_bytes(value[1:5], "big"))(value[5:])

    def close(self) -> None:
        """Let the connections go."""
        self.client.close()

    def _decoder(self, number: int) -> Decoder:
        decoder = self._decoders.get(number)
        if decoder is None or isinstance(decoder, _Refusal):
            with self._making:  # one thread asks, the others find what it got
                decoder = self._decoders.get(number)
                if decoder is None or (isinstance(decoder, _Refusal) and time.monotonic() > decoder.until):
                    if len(self._decoders) >= MAX_SCHEMAS:
                        self._decoders.clear()
                    decoder = self._decoders[number] = self._make(number)
        if isinstance(decoder, _Refusal):
            raise RecordError(decoder.error.reason, decoder.error.message, decoder.error.fix)
        return decoder

    def _make(self, number: int) -> Decoder | _Refusal:
        now = time.monotonic()
        if self._away is not None and now < self._away[1]:
            error = self._away[0]
            raise RegistryUnavailable(error.message, error.fix)
        try:
            decoder: Decoder | _Refusal = make_decoder(self.client.by_id(number), self.client)
        except RecordError as error:
            decoder = _Refusal(error, now + REFUSED_SECONDS)
        except RegistryUnavailable as error:
            if not self._given_up(number, error, now):
                self._away = (error, now + AWAY_SECONDS)
                raise
            fix = "When the registry has it again, send the record once more (`ratchet quarantine resubmit`)."
            decoder = _Refusal(RecordError("schema_unavailable", error.message, fix), now + REFUSED_SECONDS)
        else:
            self._failing.pop(number, None)
        return decoder

    def _given_up(self, number: int, error: RegistryUnavailable, now: float) -> bool:
        """True if the registry has answered, but not with this schema, for the deadline. Counts the failure."""
        since, last = self._failing.get(number, (now, now))
        if now - last > FORGET_SECONDS:
            since = now
        if len(self._failing) >= MAX_SCHEMAS:
            self._failing.clear()
        self._failing[number] = since, now
        return isinstance(error, SchemaUnavailable) and now - since >= DEADLINE_SECONDS


def make_decoder(schema: Schema, client: RegistryClient) -> Decoder:
    """The function that reads values of a schema.

    Raises:
        RecordError: ``schema``: it, or one that it imports, cannot be used.
        RegistryUnavailable: an imported schema could not be fetched.
    """
    if schema.kind == "JSON":
        return _read_json
    from streams.records.registry_formats import avro_decoder, protobuf_decoder  # only with the extra

    return avro_decoder(schema, client) if schema.kind == "AVRO" else protobuf_decoder(schema, client)


def _read_json(value: bytes) -> dict[str, Any]:
    try:
        record = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RecordError(
            "not_json", f"the value is no JSON: {str(error)[:120]}.", "Its schema in the registry says JSON."
        ) from None
    if not isinstance(record, dict):
        raise RecordError("not_json", f"the record is a JSON {type(record).__name__}.", "Send a JSON object.")
    return record
