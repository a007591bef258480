"""Avro values by fastavro.

fastavro trusts schema and value: it follows a recursive schema on the C stack until the process dies, and reads an
array of items that take no bytes as long as the value says. So only schemas are taken with which the work is bounded by
the size of the value: not recursive, no empty items, few nodes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any, Final

import fastavro

from core.errors import RecordError
from streams.records.registry.client import RegistryClient, Schema

MAX_NODES: Final = 2_000
"""Types in a schema, with each use of a named one counted anew."""
MAX_DEPTH: Final = 32
MAX_REFERENCES: Final = 64
_NAMED: Final = ("record", "error", "enum", "fixed")


def decoder(schema: Schema, client: RegistryClient) -> Callable[[bytes], dict[str, Any]]:
    """Reads values of a schema: a record, or bytes, which are the image. Raises RecordError, RegistryUnavailable."""
    named: dict[str, Any] = {}
    _load_references(schema, client, named, set())
    parsed = _parse(schema.text, named)

    if parsed in ("bytes", {"type": "bytes"}):  # Confluent's serializers leave the length out
        return lambda value: {"image": value}

    def read(value: bytes) -> dict[str, Any]:
        stream = io.BytesIO(value)
        try:
            record = fastavro.schemaless_reader(stream, parsed, None)
        except Exception as error:  # EOFError, IndexError, UnicodeDecodeError, OverflowError, ...
            raise _refusal(
                f"the value does not fit its Avro schema: {type(error).__name__} {str(error)[:120]}"
            ) from None
        if stream.tell() != len(value):
            raise _refusal(f"the value has {len(value) - stream.tell()} bytes more than its Avro schema")
        if not isinstance(record, dict):
            raise _refusal(f"the Avro schema is of a {type(record).__name__}, not of a record")
        return record

    return read


def _load_references(schema: Schema, client: RegistryClient, named: dict[str, Any], loaded: set[str]) -> None:
    """Parse what a schema imports, innermost first, into ``named``."""
    for reference in schema.references:
        if reference.name in loaded:
            continue
        loaded.add(reference.name)
        if len(loaded) > MAX_REFERENCES:
            raise _refusal(f"the Avro schema imports more than {MAX_REFERENCES} others")
        imported = client.by_reference(reference, "AVRO")
        _load_references(imported, client, named, loaded)
        _parse(imported.text, named)


def _parse(text: str, named: dict[str, Any]) -> Any:
    try:
        raw = json.loads(text)
        _check_depth(raw)
        parsed = fastavro.parse_schema(raw, named_schemas=named)
        _Cost(named).of(parsed)
    except (RecordError, MemoryError):
        raise
    except Exception as error:
        raise _refusal(f"the Avro schema is not valid: {type(error).__name__} {str(error)[:120]}") from None
    return parsed


def _check_depth(node: Any, depth: int = 0) -> None:
    if depth > 4 * MAX_DEPTH:
        raise _refusal("the Avro schema is nested too deep")
    for each in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _check_depth(each, depth + 1)


class _Cost:
    """Fewest bytes that a value of a type takes, and how many nodes reading it visits."""

    def __init__(self, named: dict[str, Any]) -> None:
        self.named = named
        self._open: set[str] = set()
        self._known: dict[str, tuple[int, int]] = {}

    def of(self, node: Any) -> tuple[int, int]:
        size, nodes = self._named(node) if isinstance(node, str) and node in self.named else self._structure(node)
        if nodes > MAX_NODES:
            raise _refusal(f"the Avro schema has more than {MAX_NODES} types")
        return size, nodes

    def _named(self, name: str) -> tuple[int, int]:
        if name in self._open or len(self._open) > MAX_DEPTH:
            raise _refusal(f"the Avro schema is recursive, or nested too deep, at {name!r}")
        if name not in self._known:
            self._known[name] = self._structure(self.named[name])
        return self._known[name]

    def _structure(self, node: Any) -> tuple[int, int]:
        if isinstance(node, list):
            costs = [self.of(each) for each in node]
            return 1 + min((size for size, _ in costs), default=0), 1 + max((nodes for _, nodes in costs), default=0)
        kind = node if isinstance(node, str) else node["type"]
        match kind:
            case "null":
                return 0, 1
            case "record" | "error":
                return self._record(node)
            case "fixed":
                if not 0 <= int(node["size"]) < 2**31:
                    raise _refusal("the Avro schema has a fixed type of no valid size")
                return int(node["size"]), 1
            case "float":
                return 4, 1
            case "double":
                return 8, 1
            case "array" | "map":
                size, nodes = self.of(node["items" if kind == "array" else "values"])
                if size == 0 and kind == "array":
                    raise _refusal("the Avro schema has an array of items that take no bytes")
                return 1, 1 + nodes
            case str():
                return (1, 1) if kind not in self.named else self.of(kind)
            case _:
                return self.of(kind)  # {"type": {"type": ...}}

    def _record(self, node: dict[str, Any]) -> tuple[int, int]:
        self._open.add(node["name"])
        costs = [self.of(field["type"]) for field in node["fields"]]
        self._open.remove(node["name"])
        return sum(size for size, _ in costs), 1 + sum(nodes for _, nodes in costs)


def _refusal(what: str) -> RecordError:
    return RecordError("schema", f"{what}.", "Send a record with the fields of a sample.")
