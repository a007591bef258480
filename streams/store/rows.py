"""Rows of the sample store's table, and the positions they come from.

Every record of the topic becomes one row, so that each can be accounted for:

    kind        what it is                                                       holds
    sample      an accepted sample                                               all sample columns
    duplicate   a record whose sample was there already                          position, id, reason, duplicate_of,
                                                                                 key, and metadata of the sample
    quarantine  a refused record: the outbox of the quarantine topic             position, reason, original bytes
    tombstone   a record without a value: a wish to delete                       position, key or id
    gap         offsets that were lost before they were read                     position (first), until, reason
    deleted     what is left of a deleted sample or refusal: its receipt         position, id, split, reason, detail,
                                                                                 tags (which of text, question it had)
                of a sample that was corrected                                   position, id, reason, detail, sent_at,
                                                                                 duplicate_of (where the id stays)
    position    how far a partition has been read; one per partition             topic, partition, offset = next to read

Readers of the store see samples only. Conditions on rows are Lance's SQL; what comes from outside is written as a
literal.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any, Final, Literal

import pyarrow as pa

Split = Literal["train", "fresh_eval"]
RecordPosition = tuple[str, int, int]
"""Stream, partition and offset of a record."""
_UTC = pa.timestamp("us", tz="UTC")

#: What :meth:`streams.store.sample_store.SampleStore.scan` returns.
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
        ("extra", pa.string()),  # JSON object of the fields that Ratchet does not know; empty where there are none
        ("time", _UTC),
        ("ingested_at", _UTC),
        ("split", pa.string()),
        ("size", pa.int64()),  # bytes of the image; of a refused record those of its value
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("topic", pa.string()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
    ]
)
SAMPLE_COLUMNS: Final = tuple(SAMPLE_SCHEMA.names)

#: Columns of a position. A fragment that has only these holds positions: so they are found without a scan.
POSITION_COLUMNS: Final = (
    "kind", "topic", "partition", "offset", "topic_id", "leader_epoch", "published", "epoch", "tally",
)  # fmt: skip

#: The whole table.
SCHEMA: Final = pa.schema(
    [
        ("kind", pa.string()),
        *SAMPLE_SCHEMA,
        ("key", pa.binary()),  # see record_key
        ("look", pa.binary(35)),  # see streams.ingest.quality.look.Look
        ("words", pa.int64()),  # see words_hash
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("duplicate_of", pa.string()),
        ("until", pa.int64()),  # of a gap: the first offset behind it
        ("original", pa.large_binary()),
        ("original_key", pa.large_binary()),
        ("original_headers", pa.string()),  # JSON: [[name, base64 or null], ...]
        ("topic_id", pa.string()),
        ("leader_epoch", pa.int32()),
        ("published", pa.int64()),
        ("epoch", pa.int64()),
        ("tally", pa.string()),  # JSON of a Tally
        ("sent_at", _UTC),  # a record's CreateTime; of the receipt of a corrected sample that of its correction
    ]
)
POSITION_SCHEMA: Final = pa.schema([SCHEMA.field(name) for name in POSITION_COLUMNS])
KEY_BYTES: Final = 256
"""Longest key that is stored as it is."""

Tally = Counter[str]
"""Numbers of rows: of each kind; of samples also ``train`` and ``fresh_eval``, and of each of those ``train/text`` and
``train/question``; ``bytes`` of images, ``refused_bytes`` of refused records. Kept with the positions, so that nothing
is counted by a scan."""


def tally_of(rows: Iterable[Mapping[str, Any]]) -> Tally:
    """The tally of new rows."""
    tally: Tally = Counter()
    for row in rows:
        tally[row["kind"]] += 1
        if row["kind"] == "sample":
            split = row["split"]
            tally[split] += 1
            tally[f"{split}/text"] += bool(row.get("text"))
            tally[f"{split}/question"] += bool(row.get("question"))
            tally["bytes"] += row.get("size") or len(row.get("image") or b"")
        elif row["kind"] == "quarantine":
            tally["refused_bytes"] += row.get("size") or 0  # none in rows of earlier versions, in and out
        elif row["kind"] == "gap":
            tally["gap_offsets"] += row["until"] - row["offset"]
    return tally


def record_key(key: bytes | None) -> bytes | None:
    """What is stored of a record's key, for deletions by it: a key over :data:`KEY_BYTES` as its SHA-256."""
    return key if key is None or len(key) <= KEY_BYTES else hashlib.sha256(key).digest()


def position_of(row: Mapping[str, Any]) -> RecordPosition:
    """The position of a row's record."""
    return row["topic"], row["partition"], row["offset"]


def name_of(position: RecordPosition) -> str:
    """A position as people write it: ``topic:partition:offset``."""
    return ":".join(map(str, position))


def parse_position(name: str) -> RecordPosition:
    """The position that :func:`name_of` wrote. Raises ValueError."""
    stream, partition, offset = name.rsplit(":", 2)
    return stream, int(partition), int(offset)


def words_hash(text: str, question: str, answer: str) -> int:
    """64 bits, signed, of the words of a sample."""
    words = f"{len(text)} {len(question)} {text}{question}{answer}".encode()
    return int.from_bytes(blake2b(words, digest_size=8).digest(), "big", signed=True)


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
    leader_epoch: int = -1
    """Kafka's leader epoch of the record before ``next``, or -1: tells a truncated log from a whole one (KIP-320)."""
    epoch: int = 0
    """How often the partition has been claimed. A commit under an older claim fails."""
    tally: Tally = field(default_factory=Counter)
    """All rows of this partition since its beginning."""

    @property
    def key(self) -> str:
        """As in :meth:`streams.store.sample_store.SampleStore.offsets`: ``topic:partition``."""
        return f"{self.stream}:{self.partition}"

    def row(self) -> dict[str, Any]:
        """The table row that holds it."""
        return {
            "kind": "position",
            "topic": self.stream,
            "partition": self.partition,
            "offset": self.next,
            "topic_id": self.topic_id,
            "leader_epoch": self.leader_epoch,
            "published": self.published,
            "epoch": self.epoch,
            "tally": json.dumps(self.tally, sort_keys=True),
        }

    @classmethod
    def parse(cls, row: Mapping[str, Any]) -> Position:
        """From a table row."""
        return cls(
            row["topic"], row["partition"], row["offset"], row["topic_id"], row["published"], row["leader_epoch"],
            row["epoch"], Counter(json.loads(row["tally"])),
        )  # fmt: skip


def newest_of_topic(positions: Iterable[Position], topic: str) -> dict[int, Position]:
    """The position in the newest generation of a topic, by partition."""
    newest: dict[int, Position] = {}
    for position in positions:
        name, generation = parse_stream(position.stream)
        old = newest.get(position.partition)
        if name == topic and (old is None or generation > parse_stream(old.stream)[1]):
            newest[position.partition] = position
    return newest


CLAIM: Final = (
    "id", "topic", "partition", "offset", "ingested_at", "sent_at", "key", "source", "domain", "concept", "label",
    "tags", "extra",
)  # fmt: skip
"""What a record adds to the content of its sample: kept also of a duplicate, to which the sample passes when the record
that brought it first is deleted."""


def duplicate_row(row: Mapping[str, Any], kind: str, of: str) -> dict[str, Any]:
    """The row that stands for a sample which repeats the sample ``of``, or is ``older`` than it: see
    :data:`streams.ingest.quality.duplicates.DuplicateKind`."""
    return {
        **{name: row[name] for name in CLAIM},
        "kind": "duplicate",
        "reason": f"duplicate_{kind}",
        "duplicate_of": of,
    }


def deletion_row(
    row: Mapping[str, Any], reason: str, detail: str, when: datetime, stays: bool = False
) -> dict[str, Any]:
    """The receipt that stands for a row which was deleted: where it was and its id, nothing of its content.

    Where ``stays``, of a duplicate or of a sample that another record sent, too, it has the id as ``duplicate_of``: the
    content was not deleted. Its tags say whether it had a text, or a question: so it is known which adapters learned
    from it.
    """
    return {
        "kind": "deleted",
        "topic": row["topic"],
        "partition": row["partition"],
        "offset": row["offset"],
        "id": None if stays else row["id"],
        "duplicate_of": row["id"] if stays else None,
        "split": row.get("split"),
        "tags": [name for name in ("text", "question") if row.get(name)],
        "reason": reason,
        "detail": detail,
        "ingested_at": when,
    }


def quoted(text: str) -> str:
    """A string literal."""
    return "'" + text.replace("'", "''") + "'"


def moment(time: datetime) -> str:
    """A time as a literal."""
    # Not strftime: it writes the year 1 as "1", which Lance cannot read.
    return f"timestamp '{time.astimezone(UTC).replace(tzinfo=None).isoformat(' ', 'microseconds')}'"


def hexadecimal(data: bytes) -> str:
    """A binary literal."""
    return f"X'{data.hex()}'"


def at_offset(stream: str, partition: int, offset: int) -> str:
    """The rows of one record."""
    return f"topic = {quoted(stream)} AND partition = {int(partition)} AND offset = {int(offset)}"


def in_gap(stream: str, partition: int, offset: int) -> str:
    """The gaps that an offset lies in."""
    place = f"topic = {quoted(stream)} AND partition = {int(partition)}"
    return f"kind = 'gap' AND {place} AND offset <= {int(offset)} AND until > {int(offset)}"


def refused(reason: str | None = None, source: str | None = None, since: datetime | None = None) -> str:
    """Refused records: for a reason, of a source (empty: of none that is known), refused at or after a time."""
    clauses = ["kind = 'quarantine'"]
    if reason is not None:
        clauses.append(f"reason = {quoted(reason)}")
    if source is not None:
        clauses.append(f"source = {quoted(source)}" if source else "(source = '' OR source IS NULL)")
    if since is not None:
        clauses.append(f"ingested_at >= {moment(since)}")
    return " AND ".join(clauses)
