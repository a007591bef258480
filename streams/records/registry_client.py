"""Client of a schema registry's REST API: two GET calls with bounds on time and size."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args
from urllib.parse import quote

import httpx

from core.errors import RecordError, RegistryUnavailable, SchemaUnavailable
from streams.records.http_body import UNCOMPRESSED, BodyTooLarge, bounded_body

SchemaType = Literal["AVRO", "JSON", "PROTOBUF"]

TIMEOUT_SECONDS: Final = 5.0
TRIES: Final = 3
PAUSE_SECONDS: Final = 0.2
"""Before the second attempt; twice as long before the third."""
MAX_RESPONSE_BYTES: Final = 2 * 1024 * 1024
MAX_ID: Final = 2**31 - 1
"""Registries use signed 32-bit IDs, and answer a larger one like a wrong URL."""
#: The registry's own codes for "no such subject, version or schema": a 404 without one is a wrong URL or a proxy.
_NOT_FOUND: Final = frozenset({"40401", "40402", "40403"})


@dataclass(frozen=True, slots=True)
class Reference:
    name: str
    subject: str
    version: int


@dataclass(frozen=True, slots=True)
class Schema:
    """A schema in the registry. ``text`` of Protobuf is a FileDescriptorProto in base64."""

    kind: SchemaType
    text: str
    references: tuple[Reference, ...] = ()


class RegistryClient:
    def __init__(self, url: str, auth: str | None = None, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self.url = url.rstrip("/")
        user, _, password = (auth or "").partition(":")
        accept = {"accept": "application/vnd.schemaregistry.v1+json, application/json"}
        self._http = httpx.Client(
            auth=httpx.BasicAuth(user, password) if auth else None,
            headers=accept | UNCOMPRESSED,
            timeout=timeout_seconds,
        )
        self._timeout_seconds = timeout_seconds

    def by_id(self, number: int) -> Schema:
        """Fetch a schema by its ID. Raises RecordError ``schema`` if it does not exist; RegistryUnavailable if the
        registry is unreachable; SchemaUnavailable if the registry answers, but not with this schema."""
        path = f"/schemas/ids/{number}"
        if number > MAX_ID:
            raise _missing(path)
        schema = self._schema(path)
        return schema if schema.kind != "PROTOBUF" else self._schema(f"{path}?format=serialized")

    def by_reference(self, reference: Reference, kind: SchemaType) -> Schema:
        """Fetch a schema that another one of the same ``kind`` imports. Raises like :meth:`by_id`."""
        path = f"/subjects/{quote(reference.subject, safe='')}/versions/{reference.version}"
        return self._schema(f"{path}?format=serialized" if kind == "PROTOBUF" else path)

    def close(self) -> None:
        self._http.close()

    def _schema(self, path: str) -> Schema:
        body = self._get(path)
        try:
            kind: Any = body.get("schemaType") or "AVRO"  # absent for Avro, the original type
            if kind not in get_args(SchemaType):
                raise RecordError(
                    "schema", f"schema {path} is of the kind {str(kind)[:40]!r}.", "Use Avro, Protobuf or JSON."
                )
            references = tuple(
                Reference(str(each["name"]), str(each["subject"]), int(each["version"]))
                for each in body.get("references") or ()
            )
            return Schema(kind, str(body["schema"]), references)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self._failing(path, "answers with something else than a schema") from None

    def _get(self, path: str) -> dict[str, Any]:
        for number in range(TRIES):
            last = number == TRIES - 1
            try:
                status, body = self._fetch(path)
            except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
                if last:
                    raise self._unavailable(f"does not answer ({type(error).__name__})") from error
            else:
                if status < 500 and status != 429:
                    return self._answer(status, body, path)
                if last:
                    raise self._failing(path, f"answers with status {status}")
            time.sleep(PAUSE_SECONDS * 2**number)
        raise AssertionError("unreachable")

    def _fetch(self, path: str) -> tuple[int, bytes]:
        with self._http.stream("GET", f"{self.url}{path}") as response:
            status = response.status_code
            try:
                return status, bounded_body(response, MAX_RESPONSE_BYTES, self._timeout_seconds)
            except BodyTooLarge as error:
                if status == 200:  # a fault of this schema: waiting would not help
                    raise RecordError("schema", f"schema {path} has {error}.", "Use a smaller one.") from None
                raise self._failing(path, f"answers with status {status} and {error}") from None

    def _answer(self, status: int, body: bytes, path: str) -> dict[str, Any]:
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            answer = None
        if status in (401, 403):
            raise self._unavailable(f"refuses us (status {status})", "Check `kafka.schema_registry_auth`.", "refused")
        if not isinstance(answer, dict):
            raise self._failing(path, f"answers with status {status} and no JSON object")
        if status == 404 and str(answer.get("error_code")) in _NOT_FOUND:
            raise _missing(path)
        if status != 200:
            raise self._failing(path, f"answers with status {status}")
        return answer

    def _unavailable(
        self, what: str, fix: str = "Check `kafka.schema_registry`.", state: Literal["away", "refused"] = "away"
    ) -> RegistryUnavailable:
        return RegistryUnavailable(f"the schema registry {self.url} {what}.", fix, state)

    def _failing(self, path: str, what: str) -> SchemaUnavailable:
        return SchemaUnavailable(
            f"the schema registry {self.url} {what} when it is asked for {path.partition('?')[0]}.",
            "Check `kafka.schema_registry`, and that schema.",
        )


def _missing(path: str) -> RecordError:
    shown = f"the schema registry has no {path.partition('?')[0]}."
    return RecordError("schema", shown, "Register the schema, then send the record again.")
