"""Records in Confluent's wire format, written by Confluent's own serializers."""

from __future__ import annotations

import json
from typing import Any

from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONSerializer
from confluent_kafka.schema_registry.protobuf import ProtobufSerializer
from confluent_kafka.serialization import MessageField, SerializationContext
from google.protobuf import descriptor_pb2, struct_pb2, timestamp_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

FieldType = descriptor_pb2.FieldDescriptorProto
AVRO = {
    "type": "record", "name": "Sample", "namespace": "org.example",
    "fields": [
        {"name": "image", "type": "bytes"},
        {"name": "text", "type": ["null", "string"], "default": None},
        {"name": "question", "type": ["null", "string"], "default": None},
        {"name": "tags", "type": {"type": "array", "items": "string"}, "default": []},
        {"name": "time", "type": ["null", {"type": "long", "logicalType": "timestamp-millis"}], "default": None},
        {"name": "boxes", "type": {"type": "array", "items": {"type": "map", "values": "double"}}, "default": []},
        {"name": "thumbnail", "type": ["null", "bytes"], "default": None},
    ],
}  # fmt: skip
JSON = {"title": "Sample", "type": "object", "properties": {"text": {"type": "string"}}}


def write_avro(url: str, record: Any, schema: Any = None) -> bytes:
    return _written(AvroSerializer(_client(url), json.dumps(schema or AVRO)), record, "avro")


def write_json(url: str, record: dict[str, Any]) -> bytes:
    return _written(JSONSerializer(json.dumps(JSON), _client(url)), record, "json")


def write_protobuf(url: str, message: Any) -> bytes:
    own = {"use.deprecated.format": False}
    return _written(ProtobufSerializer(type(message), _client(url), own), message, "protobuf")


def _client(url: str) -> SchemaRegistryClient:
    return SchemaRegistryClient({"url": url})


def _written(serializer: Any, record: Any, topic: str) -> bytes:
    return bytes(serializer(record, SerializationContext(topic, MessageField.VALUE)) or b"")


def message_types() -> dict[str, Any]:
    """Message classes: the first of its file, one nested in the second, and one whose file imports another file."""
    common = descriptor_pb2.FileDescriptorProto(name="common/box.proto", package="common", syntax="proto3")
    _message(common.message_type.add(name="Box"), x=FieldType.TYPE_DOUBLE, count=FieldType.TYPE_INT64)
    file = descriptor_pb2.FileDescriptorProto(name="sample.proto", package="org.example", syntax="proto3")
    file.dependency.extend([timestamp_pb2.DESCRIPTOR.name, struct_pb2.DESCRIPTOR.name, common.name])
    first = _message(file.message_type.add(name="Sample"), image=FieldType.TYPE_BYTES, text=FieldType.TYPE_STRING)
    for name, kind, label in (
        ("time", ".google.protobuf.Timestamp", FieldType.LABEL_OPTIONAL),
        ("extra", ".google.protobuf.Struct", FieldType.LABEL_OPTIONAL),
        ("boxes", ".common.Box", FieldType.LABEL_REPEATED),
    ):
        first.field.add(
            name=name, number=len(first.field) + 1, type=FieldType.TYPE_MESSAGE, type_name=kind, label=label
        )
    first.field.add(name="tags", number=9, type=FieldType.TYPE_STRING, label=FieldType.LABEL_REPEATED)
    outer = file.message_type.add(name="Outer")
    outer.nested_type.add(name="Other")
    _message(outer.nested_type.add(name="Inner"), image=FieldType.TYPE_STRING, text=FieldType.TYPE_STRING)
    pool: Any = DescriptorPool()
    for builtin in (timestamp_pb2, struct_pb2):
        pool.AddSerializedFile(builtin.DESCRIPTOR.serialized_pb)
    pool.Add(common)
    pool.Add(file)
    names = ("org.example.Sample", "org.example.Outer.Inner", "common.Box")
    return {name.rpartition(".")[2]: GetMessageClass(pool.FindMessageTypeByName(name)) for name in names}


def _message(message: Any, **fields: int) -> Any:
    for number, (name, kind) in enumerate(fields.items(), 1):
        message.field.add(name=name, number=number, type=kind, label=FieldType.LABEL_OPTIONAL)
    return message
