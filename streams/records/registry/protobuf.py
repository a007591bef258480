"""Protobuf values by Google's runtime, with message types made from the descriptors that the registry has.

A registry gives a schema as a serialized FileDescriptorProto when asked for ``format=serialized``, which the official
Python client relies on, too; so no ``.proto`` text has to be compiled. Values become JSON by Protobuf's own mapping
(64-bit integers are text, times RFC 3339), but for ``image``, which stays bytes.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any, Final

from google.protobuf import (
    any_pb2,
    api_pb2,
    descriptor_pb2,
    duration_pb2,
    empty_pb2,
    field_mask_pb2,
    source_context_pb2,
    struct_pb2,
    timestamp_pb2,
    type_pb2,
    wrappers_pb2,
)
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict
from google.protobuf.message_factory import GetMessageClass

from core.errors import RecordError, RegistryUnavailable
from streams.records.registry.client import RegistryClient, Schema

MAX_REFERENCES: Final = 64
MAX_INDEXES: Final = 16
"""How deep the type of a message may be nested in others."""
MAX_FIELDS_BYTES: Final = 512 * 1024
"""All fields but the image."""
_MAIN: Final = "ratchet-registry-schema.proto"


def _builtins() -> dict[str, descriptor_pb2.FileDescriptorProto]:
    """Files that every registry knows without a reference: Google's, and Confluent's, of which reading needs little."""
    known = {}
    for module in (
        any_pb2, api_pb2, descriptor_pb2, duration_pb2, empty_pb2, field_mask_pb2, source_context_pb2, struct_pb2,
        timestamp_pb2, type_pb2, wrappers_pb2,
    ):  # fmt: skip
        file = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(file)
        known[file.name] = file
    # Its options on fields stay unknown, and do no harm.
    known["confluent/meta.proto"] = descriptor_pb2.FileDescriptorProto(name="confluent/meta.proto", package="confluent")
    for package in ("type", "types"):
        decimal = descriptor_pb2.FileDescriptorProto(
            name=f"confluent/{package}/decimal.proto", package=f"confluent.{package}", syntax="proto3"
        )
        message = decimal.message_type.add(name="Decimal")
        kinds = descriptor_pb2.FieldDescriptorProto
        for number, (name, kind) in enumerate(
            [("value", kinds.TYPE_BYTES), ("precision", kinds.TYPE_UINT32), ("scale", kinds.TYPE_INT32)], 1
        ):
            message.field.add(name=name, number=number, type=kind, label=kinds.LABEL_OPTIONAL)
        known[decimal.name] = decimal
    return known


BUILTINS: Final = _builtins()


def decoder(schema: Schema, client: RegistryClient) -> Callable[[bytes], dict[str, Any]]:
    """Reads values of a schema. Raises RecordError, RegistryUnavailable."""
    try:
        pool = _Pool(client)
        file = pool.add(_MAIN, schema)
        pool.pool.FindFileByName(_MAIN)
    except (RecordError, RegistryUnavailable, MemoryError):
        raise
    except Exception as error:  # TypeError, KeyError, DecodeError
        raise _refusal(
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
            raise _refusal(f"the value does not fit its Protobuf schema: {type(error).__name__}") from None

    return read


def read_indexes(value: bytes) -> tuple[tuple[int, ...], int]:
    """Which message of the file a value is of (a path through nested types), and where the message begins.

    Numbers are zigzag varints: how many there are, then each; one zero stands for the first message of the file.
    """
    count, start = _varint(value, 0)
    if count == 0:
        return (0,), start
    if not 0 < count <= MAX_INDEXES:
        raise _refusal("the value has no valid message indexes")
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
    raise _refusal("the value ends before its message indexes do")


def _message_class(pool: Any, file: descriptor_pb2.FileDescriptorProto, indexes: tuple[int, ...]) -> Any:
    path = [file.package] if file.package else []
    types: Any = file.message_type
    for index in indexes:
        if not 0 <= index < len(types):
            raise _refusal(f"the Protobuf schema has no message {list(indexes)}")
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
        raise _refusal(f"the fields beside the image take more than {MAX_FIELDS_BYTES} bytes")
    fields: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return {**fields, "image": image} if image else fields


class _Pool:
    """The descriptors of one schema and of all that it imports, apart from those of other schemas."""

    def __init__(self, client: RegistryClient) -> None:
        self.pool: Any = DescriptorPool()
        self._client = client
        self._added: set[str] = set()

    def add(self, name: str, schema: Schema) -> descriptor_pb2.FileDescriptorProto:
        """Add a file, after those that it imports, under the name by which it is imported."""
        file = descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(schema.text, validate=True))
        file.name = name
        references = {each.name: each for each in schema.references}
        for imported in file.dependency:
            if imported in self._added:
                continue
            self._added.add(imported)
            if len(self._added) > MAX_REFERENCES:
                raise _refusal(f"the Protobuf schema imports more than {MAX_REFERENCES} others")
            if imported in references:
                self.add(imported, self._client.by_reference(references[imported], "PROTOBUF"))
            elif imported in BUILTINS:
                self._add_builtin(imported)
            else:
                raise _refusal(f"the Protobuf schema imports {imported[:120]!r}, which the registry does not name")
        self.pool.Add(file)
        return file

    def _add_builtin(self, name: str) -> None:
        for imported in BUILTINS[name].dependency:
            if imported not in self._added:
                self._added.add(imported)
                self._add_builtin(imported)
        self.pool.Add(BUILTINS[name])


def _refusal(what: str) -> RecordError:
    return RecordError("schema", f"{what}.", "Send a message with the fields of a sample.")
