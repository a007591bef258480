"""Decoders of Avro and Protobuf values with schemas from a registry.

**Avro** by fastavro, which trusts schema and value: it follows a recursive schema on the C stack until the process
dies, and reads an array of zero-byte items as long as the value says. So schemas must bound the work by the size of the
value: not recursive, no empty items, few nodes.

**Protobuf** by Google's runtime, with message types made from the registry's descriptors: ``format=serialized`` returns
a FileDescriptorProto, so no ``.proto`` text has to be compiled. Values become JSON by Protobuf's own mapping (64-bit
integers are text, times RFC 3339), except ``image``, which stays bytes.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

import fastavro
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict
from google.protobuf.message_factory import GetMessageClass

from core.errors import RecordError, RegistryUnavailable
from streams.records.registry_client import RegistryClient, Schema

MAX_NODES: Final = 2_000
"""Types in a schema, counting each use of a named type."""
MAX_DEPTH: Final = 32
MAX_REFERENCES: Final = 64
_NAMED: Final = ("record", "error", "enum", "fixed")


def avro_decoder(schema: Schema, client: RegistryClient) -> Callable[[bytes], dict[str, Any]]:
    """A decoder of records, or of bytes, which are the image. Raises RecordError, RegistryUnavailable."""
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
            raise _misfit(
                f"the value does not fit its Avro schema: {type(error).__name__} {str(error)[:120]}"
            ) from None
        if stream.tell() != len(value):
            raise _misfit(f"the value has {len(value) - stream.tell()} bytes more than its Avro schema")
        if not isinstance(record, dict):
            raise _misfit(f"the Avro schema is of a {type(record).__name__}, not of a record")
        return record

    return read


def _load_references(schema: Schema, client: RegistryClient, named: dict[str, Any], loaded: set[str]) -> None:
    for reference in schema.references:
        if reference.name in loaded:
            continue
        loaded.add(reference.name)
        if len(loaded) > MAX_REFERENCES:
            raise _misfit(f"the Avro schema imports more than {MAX_REFERENCES} others")
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
        raise _misfit(f"the Avro schema is not valid: {type(error).__name__} {str(error)[:120]}") from None
    return parsed


def _check_depth(node: Any, depth: int = 0) -> None:
    if depth > 4 * MAX_DEPTH:
        raise _misfit("the Avro schema is nested too deep")
    for each in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _check_depth(each, depth + 1)


class _Cost:
    """The fewest bytes of a type's values, and the nodes visited when reading one."""

    def __init__(self, named: dict[str, Any]) -> None:
        self.named = named
        self._open: set[str] = set()
        self._known: dict[str, tuple[int, int]] = {}

    def of(self, node: Any) -> tuple[int, int]:
        size, nodes = self._named(node) if isinstance(node, str) and node in self.named else self._structure(node)
        if nodes > MAX_NODES:
            raise _misfit(f"the Avro schema has more than {MAX_NODES} types")
        return size, nodes

    def _named(self, name: str) -> tuple[int, int]:
        if name in self._open or len(self._open) > MAX_DEPTH:
            raise _misfit(f"the Avro schema is recursive, or nested too deep, at {name!r}")
        if name not in self._known:
            self._known[name] = self._structure(self.named[name])
        return self._known[name]

    def _structure(self, node: Any) -> tuple[int, int]:
        if isinstance(node, list):
            costs = [self.of(each) for each in node]
            return 1 + min((size for size, _ in costs), default=0), 1 + max((nodes for _, nodes in costs), default=0)
        kind = node if isinstance(node, str) else node["type"]
        match kind:
            case "null" | "float" | "double":
                return {"null": 0, "float": 4, "double": 8}[kind], 1
            case "record" | "error":
                self._open.add(node["name"])
                costs = [self.of(field["type"]) for field in node["fields"]]
                self._open.remove(node["name"])
                return sum(size for size, _ in costs), 1 + sum(nodes for _, nodes in costs)
            case "fixed":
                if not 0 <= int(node["size"]) < 2**31:
                    raise _misfit("the Avro schema has a fixed type of no valid size")
                return int(node["size"]), 1

            case "array" | "map":
                size, nodes = self.of(node["items" if kind == "array" else "values"])
                if size == 0 and kind == "array":
                    raise _misfit("the Avro schema has an array of items that take no bytes")
                return 1, 1 + nodes
            case str():
                return (1, 1) if kind not in self.named else self.of(kind)
            case _:
                return self.of(kind)  # {"type": {"type": ...}}


def _misfit(what: str) -> RecordError:
    return RecordError("schema", f"{what}.", "Send a record with the fields of a sample.")


MAX_INDEXES: Final = 16
MAX_FIELDS_BYTES: Final = 512 * 1024
_MAIN: Final = "ratchet-registry-schema.proto"
_GOOGLE: Final = (
    "any", "api", "descriptor", "duration", "empty", "field_mask", "source_context", "struct", "timestamp", "type",
    "wrappers",
)  # fmt: skip


def _builtins() -> dict[str, descriptor_pb2.FileDescriptorProto]:
    """Files that every registry knows without a reference: Google's, and Confluent's field options, which stay
    unknown."""
    known = {"confluent/meta.proto": descriptor_pb2.FileDescriptorProto(name="confluent/meta.proto")}
    for name in _GOOGLE:
        file = descriptor_pb2.FileDescriptorProto()
        import_module(f"google.protobuf.{name}_pb2").DESCRIPTOR.CopyToProto(file)
        known[file.name] = file
    return known


BUILTINS: Final = _builtins()


def protobuf_decoder(schema: Schema, client: RegistryClient) -> Callable[[bytes], dict[str, Any]]:
    try:
        pool = _Pool(client)
        file = pool.add(_MAIN, schema)
        pool.pool.FindFileByName(_MAIN)
    except (RecordError, RegistryUnavailable, MemoryError):
        raise
    except Exception as error:  # TypeError, KeyError, DecodeError
        raise _misfit(
            f"the Protobuf schema is not valid, or not serialized as asked: {type(error).__name__} {str(error)[:120]}"
        ) from None
    classes: dict[tuple[int, ...], Any] = {}

    def read(value: bytes) -> dict[str, Any]:
        indexes, start = read_indexes(value)
        if indexes not in classes:
            classes[indexes] = _message_class(pool.pool, file, indexes)
        try:
            message = classes[indexes].FromString(value[start:])
            return _fields(message)
        except RecordError:
            raise
        except Exception as error:  # DecodeError, SerializeToJsonError, TypeError for an unknown Any
            raise _misfit(f"the value does not fit its Protobuf schema: {type(error).__name__}") from None

    return read


def read_indexes(value: bytes) -> tuple[tuple[int, ...], int]:
    """The message type of a value, as a path of indexes through nested types, and the offset where the message begins.
    Numbers are zigzag varints: the count, then each index; a single zero stands for the first message of the file."""
    count, start = _varint(value, 0)
    if count == 0:
        return (0,), start
    if not 0 < count <= MAX_INDEXES:
        raise _misfit("the value has no valid message indexes")
    indexes = []
    for _ in range(count):
        index, start = _varint(value, start)
        indexes.append(index)
    return tuple(indexes), start


def _varint(value: bytes, start: int) -> tuple[int, int]:
    number = 0
    for place, byte in enumerate(value[start : start + 5]):
        number |= (byte & 0x7F) << (7 * place)
        if not byte & 0x80:
            return (number >> 1) ^ -(number & 1), start + place + 1
    raise _misfit("the value ends before its message indexes do")


def _message_class(pool: Any, file: descriptor_pb2.FileDescriptorProto, indexes: tuple[int, ...]) -> Any:
    path = [file.package] if file.package else []
    types: Any = file.message_type
    for index in indexes:
        if not 0 <= index < len(types):
            raise _misfit(f"the Protobuf schema has no message {list(indexes)}")
        path.append(types[index].name)
        types = types[index].nested_type
    return GetMessageClass(pool.FindMessageTypeByName(".".join(path)))


def _fields(message: Any) -> dict[str, Any]:
    image: bytes | None = None
    field = message.DESCRIPTOR.fields_by_name.get("image")
    if field is not None and field.type == field.TYPE_BYTES and not field.is_repeated:
        image = message.image
        message.ClearField("image")
    if message.ByteSize() > MAX_FIELDS_BYTES:
        raise _misfit(f"the fields next to the image take more than {MAX_FIELDS_BYTES} bytes")
    fields: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return {**fields, "image": image} if image else fields


class _Pool:
    def __init__(self, client: RegistryClient) -> None:
        self.pool: Any = DescriptorPool()
        self._client = client
        self._added: set[str] = set()

    def add(self, name: str, schema: Schema) -> descriptor_pb2.FileDescriptorProto:
        file = descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(schema.text, validate=True))
        file.name = name
        references = {each.name: each for each in schema.references}
        for imported in file.dependency:
            if imported in self._added:
                continue
            self._added.add(imported)
            if len(self._added) > MAX_REFERENCES:
                raise _misfit(f"the Protobuf schema imports more than {MAX_REFERENCES} others")
            if imported in references:
                self.add(imported, self._client.by_reference(references[imported], "PROTOBUF"))
            elif imported in BUILTINS:
                self._add_builtin(imported)
            else:
                raise _misfit(f"the Protobuf schema imports {imported[:120]!r}, which the registry does not name")
        self.pool.Add(file)
        return file

    def _add_builtin(self, name: str) -> None:
        for imported in BUILTINS[name].dependency:
            if imported not in self._added:
                self._added.add(imported)
                self._add_builtin(imported)
        self.pool.Add(BUILTINS[name])
