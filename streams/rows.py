"""Rows of the sample store's table, and the positions they come from.

Every record of the topic becomes one row, so that each can be accounted for:

    kind        what it is                                                       holds
    sample      an accepted sample                                               all sample columns
    duplicate   a record whose sample was there already                          position, id, reason, duplicate_of
    quarantine  a refused record: the outbox of the quarantine topic             position, reason, original bytes
    position    how far a partition has been read; one per partition             topic, partition, offset = next to read

Readers of the store see samples only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Literal

import pyarrow as pa

Split = Literal["train", "fresh_eval"]
_UTC = pa.timestamp("us", tz="UTC")

#: What :meth:`streams.store.SampleStore.scan` returns.
SAMPLE_SCHEMA: Final = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.large_binary()),
        ("text", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("domain", pa.string()),
        ("source", pa.string()),
        ("concept", pa.string()),
        ("label", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("time", _UTC),
        ("ingested_at", _UTC),
        ("split", pa.string()),
        ("phash", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("topic", pa.string()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
    ]
)
SAMPLE_COLUMNS: Final = tuple(SAMPLE_SCHEMA.names)

#: The whole table.
SCHEMA: Final = pa.schema(
    [
        ("kind", pa.string()),
        *SAMPLE_SCHEMA,
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("duplicate_of", pa.string()),
        ("original", pa.large_binary()),
        ("original_key", pa.large_binary()),
        ("original_headers", pa.string()),  # JSON: [[name, base64 or null], ...]
        ("topic_id", pa.string()),
        ("published", pa.int64()),
    ]
)


def stream_name(topic: str, generation: int) -> str:
    """Name of one generation of a topic. A topic that was lost and made anew starts its offsets again at 0, so its
    second log is ``topic@1``, the next ``topic@2``; ``@`` is not allowed in topic names, so these are unambiguous."""
    return f"{topic}@{generation}" if generation else topic


def parse_stream(stream: str) -> tuple[str, int]:
    """Topic and generation of a stream name."""
    topic, _, generation = stream.partition("@")
    return topic, int(generation or 0)


@dataclass(frozen=True, slots=True)
class Position:
    """How far one partition of one stream has been read."""

    stream: str
    partition: int
    next: int
    """Offset of the next record to read."""
    topic_id: str = ""
    """Kafka's id of the topic, or empty where the broker has none: tells a lost log from a known one."""
    published: int = 0
    """Refused records below this offset are known to be in the quarantine topic."""

    @property
    def key(self) -> str:
        """As in :meth:`streams.store.SampleStore.offsets`: ``topic:partition``."""
        return f"{self.stream}:{self.partition}"

    def row(self) -> dict[str, Any]:
        """The table row that holds it."""
        return {
            "kind": "position",
            "topic": self.stream,
            "partition": self.partition,
            "offset": self.next,
            "topic_id": self.topic_id,
            "published": self.published,
        }


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a commit is based on: a version of the store, and the positions it holds."""

    version: int
    positions: dict[str, Position] = field(default_factory=dict)
    fence: tuple[int, ...] = ()
    """Fragments that hold the positions; the next commit replaces them."""

    def of_topic(self, topic: str) -> dict[int, Position]:
        """The newest position of each partition of a topic."""
        newest: dict[int, Position] = {}
        for position in self.positions.values():
            name, generation = parse_stream(position.stream)
            old = newest.get(position.partition)
            if name == topic and (old is None or generation > parse_stream(old.stream)[1]):
                newest[position.partition] = position
        return newest
