"""A minimal schema registry over real HTTP, for Confluent's serializers and our reader. It can be down, slow or
wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.web_server import reply, web_server


class Registry:
    def __init__(self) -> None:
        self.schemas: list[dict[str, Any]] = []  # the id is the place, from 1
        self.subjects: dict[str, list[int]] = {}
        self.calls: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.answers: list[tuple[int, bytes]] = []
        self.always: tuple[int, bytes] | None = None
        self.broken: set[int] = set()
        self.url = ""

    def register(self, subject: str, body: dict[str, Any]) -> int:
        """ID of a schema: a new one unless it was registered before."""
        schema = {name: body[name] for name in ("schema", "schemaType", "references") if body.get(name)}
        if schema not in self.schemas:
            self.schemas.append(schema)
        number = self.schemas.index(schema) + 1
        versions = self.subjects.setdefault(subject, [])
        if number not in versions:
            versions.append(number)
        return number

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        if self.answers:
            return self.answers.pop(0)
        if self.always is not None:
            return self.always
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        form = parse_qs(urlsplit(path).query).get("format")
        match method, parts:
            case "POST", ["subjects", subject, "versions"]:
                return _json({"id": self.register(subject, body)})
            case "POST", ["subjects", subject]:
                number = self.register(subject, body)
                version = self.subjects[subject].index(number) + 1
                return _json({"subject": subject, "id": number, "version": version, **self.schemas[number - 1]})
            case "GET", ["schemas", "ids", number] if int(number) in self.broken:
                return _json({"error_code": 50001, "message": "Error in the backend data store"}, 500)
            case "GET", ["schemas", "ids", number] if 0 < int(number) <= len(self.schemas):
                return _json(self._shown(int(number), form))
            case "GET", ["subjects", subject, "versions", version] if subject in self.subjects:
                number = self.subjects[subject][int(version) - 1]
                return _json({"subject": subject, "version": int(version), "id": number, **self._shown(number, form)})
        return _json({"error_code": 40403, "message": "Schema not found"}, 404)

    def _shown(self, number: int, form: list[str] | None) -> dict[str, Any]:
        """As Confluent's does: Protobuf is text unless the serialized form is asked for."""
        schema = self.schemas[number - 1]
        if schema.get("schemaType") == "PROTOBUF" and form != ["serialized"]:
            return {**schema, "schema": 'syntax = "proto3"; // text'}
        return schema


@contextmanager
def running(registry: Registry) -> Iterator[Registry]:
    """Serve the registry on ``registry.url`` until the block ends."""

    def answer(head: str, body: bytes) -> bytes:
        first, *lines = head.splitlines()
        registry.calls.append(first.rpartition(" ")[0])
        registry.headers.append({name.lower(): value for name, _, value in (line.partition(": ") for line in lines)})
        method, path, _ = first.split(" ")
        status, data = registry.answer(method, path, json.loads(body or b"{}"))
        kind = "application/vnd.schemaregistry.v1+json"
        return reply(data, f"{status} Said", content_type=kind, connection="close")

    with web_server(answer=answer) as server:
        registry.url = f"http://127.0.0.1:{server.port}"
        yield registry


def _json(value: dict[str, Any], status: int = 200) -> tuple[int, bytes]:
    return status, json.dumps(value).encode()
