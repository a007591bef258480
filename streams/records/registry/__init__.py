"""Records in Confluent's wire format: a zero byte, a schema id (4 bytes, big-endian), then Avro, Protobuf or JSON.

https://docs.confluent.io/platform/current/schema-registry/fundamentals/serdes-develop/index.html#wire-format

    client     asks the registry over HTTP, with bounds, timeouts and retries
    decoders   makes, for one schema, the function from bytes to fields, and keeps it; gives a schema up that the
               registry fails at for too long
    avro       Avro by fastavro
    protobuf   Protobuf by Google's runtime, from the descriptors that the registry has (no protoc)

**Why these libraries.** The official client (``confluent-kafka``) brings librdkafka, a second Kafka client, and some
twenty packages for its encryption rules, evaluates such rules on the consumer, and lets errors of many libraries
through; the tests use it to write records, and nothing else does. What reading needs of a registry is two GET calls, so
the client is ours, on httpx, and the formats are left to the two best-kept libraries for them: ``fastavro`` and
``protobuf``. They are the extra ``ratchet-server[registry]``. A JSON value is not validated against its JSON Schema:
what a sample must be is checked by :mod:`ratchet_client.records`, whatever the producer promised.

**Outage or refusal.** A registry that does not answer, or answers with an error of its own, is an outage
(:class:`~core.errors.RegistryUnavailable`): nothing is known about the record, so ingest waits. An id that the registry
does not have, a schema that cannot be used, and a value that does not fit it are refusals (reason ``schema``). A schema
at which the registry fails while it answers is waited for, too, but not for ever: after
``kafka.schema_deadline_seconds``, or a tenth of that where another schema can be read meanwhile, its records are
refused as ``schema_unavailable``.
"""

from __future__ import annotations

from streams.records.registry.decoders import SchemaRegistry

__all__ = ["SchemaRegistry"]
