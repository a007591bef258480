"""From values in Confluent's wire format to fields; what was made for a schema is kept."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from core.errors import ConfigError, RecordError, RegistryUnavailable, SchemaUnavailable
from core.settings.streams import Kafka
from streams.records.registry.client import TIMEOUT_SECONDS, RegistryClient, Schema

Decoder = Callable[[bytes], dict[str, Any]]

MAX_SCHEMAS: Final = 512
"""Decoders kept; the one that was not used for longest goes."""
REFUSED_SECONDS: Final = 30.0
"""How long a schema that is not there, or not usable, is not asked for again: it may be registered late."""
AWAY_SECONDS: Final = 1.0
"""How long a registry that was away is not asked again, so that threads do not all wait for its timeouts in turn."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    error: RecordError
    until: float


class SchemaRegistry:
    """Reads records whose schemas a registry has. Thread safe.

    >>> registry = SchemaRegistry.of(settings.kafka)
    >>> sample = decode(record.value, record.headers, registry=registry)
    """

    def __init__(
        self,
        url: str,
        auth: str | None = None,
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
        deadline_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is asked before the first record.

        Args:
            auth: ``user:password``.
            deadline_seconds: see :class:`streams.records.registry.decoders.FailingSchemas`.
            clock: what the deadline is measured with.

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
        self._decoders: OrderedDict[int, Decoder | _Refusal] = OrderedDict()
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self._away: tuple[RegistryUnavailable, float] | None = None
        self._failing = FailingSchemas(deadline_seconds, clock)

    @classmethod
    def of(cls, kafka: Kafka) -> SchemaRegistry | None:
        """The registry of the settings, or None where none is set."""
        if not kafka.schema_registry:
            return None
        auth = kafka.schema_registry_auth
        return cls(
            kafka.schema_registry,
            auth.get_secret_value() if auth else None,
            deadline_seconds=kafka.schema_deadline_seconds,
        )

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
        decoder = self._cached(number)
        if decoder is None:
            with self._making:  # one thread asks, the others find what it got
                decoder = self._cached(number) or self._keep(number, self._make(number))
        if isinstance(decoder, _Refusal):
            error = decoder.error
            raise RecordError(error.reason, error.message, error.fix)
        return decoder

    def _cached(self, number: int) -> Decoder | _Refusal | None:
        with self._lock:
            decoder = self._decoders.get(number)
            if isinstance(decoder, _Refusal) and time.monotonic() > decoder.until:
                del self._decoders[number]
                return None
            if decoder is not None:
                self._decoders.move_to_end(number)
            return decoder

    def _keep(self, number: int, decoder: Decoder | _Refusal) -> Decoder | _Refusal:
        with self._lock:
            self._decoders[number] = decoder
            while len(self._decoders) > MAX_SCHEMAS:
                self._decoders.popitem(last=False)
        return decoder

    def _make(self, number: int) -> Decoder | _Refusal:
        if self._away is not None and time.monotonic() < self._away[1]:
            error = self._away[0]
            raise RegistryUnavailable(error.message, error.fix)
        try:
            decoder: Decoder | _Refusal = make_decoder(self.client.by_id(number), self.client)
        except RecordError as error:
            decoder = _Refusal(error, time.monotonic() + REFUSED_SECONDS)
        except RegistryUnavailable as error:
            given_up = self._failing.failed(number, error, self._is_up)
            if given_up is None:
                self._away = (error, time.monotonic() + AWAY_SECONDS)
                raise
            return _Refusal(given_up, time.monotonic() + REFUSED_SECONDS)
        self._failing.succeeded(number)
        return decoder

    def _is_up(self) -> bool:
        """Whether the registry gives a schema that it gave before."""
        with self._lock:
            known = next(
                (n for n, decoder in reversed(self._decoders.items()) if not isinstance(decoder, _Refusal)), None
            )
        if known is None:
            return False
        try:
            self.client.by_id(known)
        except (RegistryUnavailable, RecordError):
            return False
        return True


def make_decoder(schema: Schema, client: RegistryClient) -> Decoder:
    """What reads values of a schema.

    Raises:
        RecordError: ``schema``: it, or one that it imports, cannot be used.
        RegistryUnavailable: an imported schema could not be fetched.
    """
    if schema.kind == "JSON":
        return _read_json
    from streams.records.registry import avro, protobuf

    return avro.decoder(schema, client) if schema.kind == "AVRO" else protobuf.decoder(schema, client)


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


FEWEST_TRIES: Final = 3
PROVEN_SHARE: Final = 0.1
"""Of the deadline: so much is enough where another schema of the same registry can be read meanwhile."""
FORGET_SECONDS: Final = 120.0
"""A failure after so long without one is the first: the consumer tries again every ten seconds at the latest."""
MAX_FAILING: Final = 512


@dataclass(slots=True)
class _Failure:
    since: float
    last: float
    tries: int = 0


class FailingSchemas:
    """Since when each schema fails, and when it is given up. Thread safe."""

    def __init__(self, deadline_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """``deadline_seconds``: 0 never gives up."""
        self._deadline = deadline_seconds
        self._clock = clock
        self._failures: OrderedDict[int, _Failure] = OrderedDict()
        self._lock = threading.Lock()

    def succeeded(self, number: int) -> None:
        """The registry gave this schema, or said that there is none."""
        with self._lock:
            self._failures.pop(number, None)

    def failed(self, number: int, error: RegistryUnavailable, is_up: Callable[[], bool]) -> RecordError | None:
        """Count a failure of a schema. Returns what its records are refused with, once it is given up.

        It is given up when the registry has answered, but not with it, for the deadline; or, whatever the failure was,
        when it has failed for a tenth of that and ``is_up`` says that another schema can be read.
        """
        now = self._clock()
        failure = self._count(number, now)
        seconds = now - failure.since
        if not self._deadline or failure.tries < FEWEST_TRIES or seconds < self._deadline * PROVEN_SHARE:
            return None
        if not (isinstance(error, SchemaUnavailable) and seconds >= self._deadline) and not is_up():
            return None
        return RecordError(
            "schema_unavailable",
            f"{error.message} It has failed {failure.tries} times in {seconds:.0f} s.",
            "When the registry has it again, send the record once more (`ratchet quarantine resubmit`).",
        )

    def _count(self, number: int, now: float) -> _Failure:
        with self._lock:
            failure = self._failures.pop(number, None)
            if failure is None or now - failure.last > FORGET_SECONDS:
                failure = _Failure(now, now)
            failure.last, failure.tries = now, failure.tries + 1
            self._failures[number] = failure
            while len(self._failures) > MAX_FAILING:
                self._failures.popitem(last=False)
            return failure
