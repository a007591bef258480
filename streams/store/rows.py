"""The Lance table of the sample store: its rows, and the positions they come from. Every record of the topic becomes
one row, so that each can be accounted for:

    kind        meaning                                                          columns
    sample      an accepted sample                                               all sample columns; reason and detail
                                                                                 if it is held
    duplicate   a record whose sample was there already                          position, id, reason, duplicate_of,
                                                                                 key, and metadata of the sample
    quarantine  the outbox of the quarantine topic                               position, reason, original bytes
    tombstone   a record without a value: a request to delete                    position, key or id
    gap         offsets that were lost before they were read                     position (first), until, reason
    deleted     receipt of a deleted sample or quarantined record                position, id, split, reason, detail,
                                                                                 tags (which of text, question it had)
                receipt of a corrected sample                                    position, id, reason, detail, sent_at,
                                                                                 duplicate_of (where the id stays)
    position    reading progress; one row per partition                          topic, partition, offset = next to read

A position is a row in its own fragment, written with only the columns of a position. The manifest tells which fragments
those are, so finding the positions costs the same whatever is stored. Readers of the store see samples only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from itertools import islice
from typing import Any, Final, Literal, TypeVar, get_args

import lance
import pyarrow as pa
from lance.file import LanceFileSession
from lance.fragment import write_fragments

from core.dependencies import storage_state
from core.errors import RecordError, StoreError, StoreFull, StoreUnavailable

log = logging.getLogger(__name__)
T = TypeVar("T")
Split = Literal["train", "fresh_eval", "held_train", "held_fresh_eval"]
"""Where a sample is used. A held one is neither learned from nor judged with until it is accepted: then it is on the
side that follows ``held_``."""
SPLITS: Final[tuple[Split, ...]] = get_args(Split)
HELD: Final = "held_"
ACCEPTED: Final = "@accepted"
"""Among next offsets by partition: the version of the store up to which samples that were held are accepted. So they
are new to an update that began before, wherever their records are."""
RecordPosition = tuple[str, int, int]
_UTC = pa.timestamp("us", tz="UTC")
_POSITION: Final = re.compile(r"([^:]{1,260}):([0-9]{1,9}):([0-9]{1,18})")

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
        ("size", pa.int64()),  # bytes of the image; for a quarantined record, of its value
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("topic", pa.string()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
    ]
)
SAMPLE_COLUMNS: Final = tuple(SAMPLE_SCHEMA.names)

#: A fragment with only these columns holds positions, so they are found without a scan.
POSITION_COLUMNS: Final = (
    "kind", "topic", "partition", "offset", "topic_id", "leader_epoch", "published", "epoch", "tally",
)  # fmt: skip

SCHEMA: Final = pa.schema(
    [
        ("kind", pa.string()),
        *SAMPLE_SCHEMA,
        ("key", pa.binary()),  # see record_key
        ("look", pa.binary(35)),  # see streams.ingest.perceptual_hash.PerceptualHash
        ("words", pa.int64()),  # see words_hash
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("duplicate_of", pa.string()),
        ("until", pa.int64()),  # of a gap: the offset after its last; of an accepted sample: see ACCEPTED
        ("original", pa.large_binary()),
        ("original_key", pa.large_binary()),
        ("original_headers", pa.string()),  # JSON: [[name, base64 or null], ...]
        ("topic_id", pa.string()),
        ("leader_epoch", pa.int32()),
        ("published", pa.int64()),
        ("epoch", pa.int64()),
        ("tally", pa.string()),  # JSON of a Tally
        ("sent_at", _UTC),  # a record's CreateTime; on the receipt of a corrected sample, that of its correction
    ]
)
POSITION_SCHEMA: Final = pa.schema([SCHEMA.field(name) for name in POSITION_COLUMNS])
KEY_BYTES: Final = 256

Tally = Counter[str]
"""Row counts by kind; samples also by split, for each of those as in ``train/text`` and ``train/question``, and those
``accepted``; ``bytes`` of images, ``refused_bytes`` of quarantined records. Kept with the positions, so that no scan
is needed."""


def tally_of(rows: Iterable[Mapping[str, Any]]) -> Tally:
    tally: Tally = Counter()
    for row in rows:
        tally[row["kind"]] += 1
        if row["kind"] == "sample":
            split = row["split"]
            tally[split] += 1
            tally[f"{split}/text"] += bool(row.get("text"))
            tally[f"{split}/question"] += bool(row.get("question"))
            tally["accepted"] += row.get("until") is not None
            tally["bytes"] += row.get("size") or len(row.get("image") or b"")
        elif row["kind"] == "quarantine":
            tally["refused_bytes"] += row.get("size") or 0  # rows of earlier versions have none
        elif row["kind"] == "gap":
            tally["gap_offsets"] += row["until"] - row["offset"]
    return tally


def record_key(key: bytes | None) -> bytes | None:
    """The stored form of a record's key, used by deletions: SHA-256 if longer than :data:`KEY_BYTES`."""
    return key if key is None or len(key) <= KEY_BYTES else hashlib.sha256(key).digest()


def position_of(row: Mapping[str, Any]) -> RecordPosition:
    return row["topic"], row["partition"], row["offset"]


def name_of(position: RecordPosition) -> str:
    return ":".join(map(str, position))


def parse_position(name: str) -> RecordPosition:
    """Parse the output of :func:`name_of`. Raises ValueError."""
    stream, partition, offset = name.rsplit(":", 2)
    return stream, int(partition), int(offset)


def read_position(text: str) -> RecordPosition:
    match = _POSITION.fullmatch(text)
    if match is None:
        raise RecordError("position", f"{text[:300]!r} is not a record's position.", "It reads topic:partition:offset.")
    return match[1], int(match[2]), int(match[3])


def words_hash(text: str, question: str, answer: str) -> int:
    words = f"{len(text)} {len(question)} {text}{question}{answer}".encode()
    return int.from_bytes(blake2b(words, digest_size=8).digest(), "big", signed=True)


def stream_name(topic: str, generation: int) -> str:
    """Name of one generation of a topic. The offsets of a topic that was lost and recreated start again at 0, so its
    second log is ``topic@1``, the next ``topic@2``; topic names cannot contain ``@``."""
    return f"{topic}@{generation}" if generation else topic


def parse_stream(stream: str) -> tuple[str, int]:
    topic, _, generation = stream.partition("@")
    return topic, int(generation or 0)


@dataclass(frozen=True, slots=True)
class Position:
    stream: str
    partition: int
    next: int
    topic_id: str = ""
    """Kafka's topic ID, or empty if the broker has none: tells a lost log from a known one."""
    published: int = 0
    """Quarantined records below this offset are known to be in the quarantine topic."""
    leader_epoch: int = -1
    """Kafka's leader epoch of the record before ``next``, or -1: detects a truncated log (KIP-320)."""
    epoch: int = 0
    """Number of claims on the partition so far. A commit under an older claim fails."""
    tally: Tally = field(default_factory=Counter)

    @property
    def key(self) -> str:
        return f"{self.stream}:{self.partition}"

    def row(self) -> dict[str, Any]:
        same = ("partition", "topic_id", "leader_epoch", "published", "epoch")
        named = {"topic": self.stream, "offset": self.next, "tally": json.dumps(self.tally, sort_keys=True)}
        return {"kind": "position", **named, **{name: getattr(self, name) for name in same}}

    @classmethod
    def parse(cls, row: Mapping[str, Any]) -> Position:
        return cls(
            row["topic"], row["partition"], row["offset"], row["topic_id"], row["published"], row["leader_epoch"],
            row["epoch"], Counter(json.loads(row["tally"])),
        )  # fmt: skip


def newest_of_topic(positions: Iterable[Position], topic: str) -> dict[int, Position]:
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
"""Columns that a record adds to its sample's content. Duplicates keep them too: the sample passes to one when the
record that brought it first is deleted."""


def duplicate_row(row: Mapping[str, Any], kind: str, of: str) -> dict[str, Any]:
    """The row for a sample that repeats the sample ``of``, or is ``older``: see
    :data:`streams.ingest.duplicates.DuplicateKind`."""
    return {
        **{name: row[name] for name in CLAIM},
        "kind": "duplicate",
        "reason": f"duplicate_{kind}",
        "duplicate_of": of,
    }


def deletion_row(
    row: Mapping[str, Any], reason: str, detail: str, when: datetime, stays: bool = False
) -> dict[str, Any]:
    """The receipt of a deleted row: its position and ID, none of its content. With ``stays`` (a duplicate, or a sample
    that another record also sent) the ID moves to ``duplicate_of``: the content was not deleted. The tags say whether
    it had a text or a question, which tells the adapters that learned from it."""
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


def gap_row(stream: str, partition: int, start: int, until: int, reason: str, why: str) -> dict[str, Any]:
    return {
        "kind": "gap",
        "topic": stream,
        "partition": partition,
        "offset": start,
        "until": until,
        "reason": reason,
        "detail": f"{until - start} offsets: {why}"[:500],
        "ingested_at": datetime.now(UTC),
    }


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    left = iter(items)
    while some := list(islice(left, size)):
        yield some


#: Lance's caches per process; the defaults are sized for a whole server's memory.
METADATA_CACHE_BYTES: Final = 32 << 20
INDEX_CACHE_BYTES: Final = 64 << 20
FORMAT: Final = "3"
MIGRATED: Final = "2"
"""The previous format, without the column ``sent_at``: readable as it is, and migrated by the first process that
writes. Versions from before the migration keep it."""
MIGRATION_ATTEMPTS: Final = 30
ROOT: Final = Position("", -1, 0)
"""A position of no partition. Creating a partition's first position replaces it, so that two processes cannot do so at
once. Its tally holds what deletions removed."""


class SampleTable:
    def __init__(self, lake: str) -> None:
        self.url = f"{lake.rstrip('/')}/samples.lance"
        self._session = lance.Session(INDEX_CACHE_BYTES, METADATA_CACHE_BYTES)

    def open(self, version: int | None = None) -> Any | None:
        """Open a version as a Lance dataset; the newest by default, None if there is no table yet. Raises
        StoreUnavailable in an outage, StoreError if the version is no longer kept, or the table is from another version
        of Ratchet."""
        if version == 0:
            return None
        try:
            dataset = lance.dataset(self.url, version=version, session=self._session)
        except (ValueError, OSError) as error:
            text = str(error).lower()
            if "not found" not in text or "nosuchbucket" in text or "bucket does not exist" in text:
                raise outage(self.url, "read", error) from error
            if version is None:
                return None
            raise StoreError(
                f"the sample store {self.url} has no version {version} (any more).",
                "Old versions are removed unless an update is pinned to them; start again from the latest.",
            ) from error
        if _format(dataset) not in (FORMAT, MIGRATED):
            raise StoreError(
                f"the sample store {self.url} was made by another version of Ratchet.",
                "Use that version, or a newer one (docs/deployer/upgrade.md).",
            )
        return dataset

    def create(self) -> Any:
        """Open the table, creating or migrating it if needed. Safe when several processes start at once."""
        dataset = self.open()
        if dataset is not None:
            return dataset if _format(dataset) == FORMAT else self._migrate(dataset)
        identity = {
            "ratchet.format": FORMAT,
            "ratchet.store": secrets.token_hex(16),
            "ratchet.split_key": secrets.token_hex(32),
        }
        schema = SCHEMA.with_metadata(identity)
        root = pa.Table.from_pylist([ROOT.row()], schema=schema)
        try:
            # Not write_dataset(mode="create"), which overwrites the winner's table when it loses the race. Without
            # retries the commit writes version 1 or fails.
            fragments = write_fragments(root, self.url, schema=schema, mode="create")
            lance.LanceDataset.commit(self.url, lance.LanceOperation.Overwrite(schema, fragments), max_retries=0)
        except OSError as error:
            if self.open() is None:
                raise outage(self.url, "made", error) from error
        return self.open()

    def _migrate(self, dataset: Any) -> Any:
        """Migrate a table of the previous format, without rewriting data. The column comes first: a process that dies
        in between leaves a table whose column is not added twice. Raises StoreUnavailable."""
        log.warning("the sample store %s is migrated from format %s to %s", self.url, _format(dataset), FORMAT)
        failure: Exception | None = None
        for _ in range(MIGRATION_ATTEMPTS):
            dataset = self.open()
            if _format(dataset) == FORMAT:
                return dataset
            try:
                if "sent_at" in dataset.schema.names:
                    dataset.update_schema_metadata({"ratchet.format": FORMAT})
                else:
                    dataset.add_columns(pa.schema([SCHEMA.field("sent_at")]))
            except (OSError, RuntimeError, ValueError) as error:  # another process may have been faster
                failure = error
                time.sleep(random.uniform(0.01, 0.1))  # noqa: S311  (spreads the tries)
        raise outage(self.url, "migrated", failure or RuntimeError("others change it all the time"))

    def identity(self) -> tuple[str, bytes]:
        """The store's name and the secret key of its split. Creates the table."""
        metadata = self.create().schema.metadata
        return metadata[b"ratchet.store"].decode(), bytes.fromhex(metadata[b"ratchet.split_key"].decode())

    def discard(self, files: Iterable[str]) -> None:
        session = LanceFileSession(f"{self.url}/data")
        for name in files:
            try:
                session.delete_file(name)
            except (OSError, RuntimeError, ValueError) as error:
                log.warning("%s is left for Lance to clean up: %s", name, error)


def _format(dataset: Any) -> str:
    return str(dict(dataset.schema.metadata or {}).get(b"ratchet.format", b"").decode())


def position_fragments(dataset: Any) -> list[Any]:
    """The fragments that hold positions: those without other columns, and the table's first."""
    names = {dataset.lance_schema.field(name).id() for name in POSITION_COLUMNS}
    return [
        fragment
        for fragment in dataset.get_fragments()
        if fragment.fragment_id == 0 or all(set(file.fields) <= names for file in fragment.data_files())
    ]


def positions(dataset: Any) -> Iterator[tuple[int, Position]]:
    fragments = position_fragments(dataset)
    if not fragments:
        return
    with reading_store(dataset.uri):
        table = dataset.scanner(columns=list(POSITION_COLUMNS), fragments=fragments, with_row_address=True).to_table()
    for row in table.to_pylist():
        yield int(row["_rowaddr"]) >> 32, Position.parse(row)


@contextmanager
def reading_store(url: str) -> Iterator[None]:
    """Turn errors of a scan into StoreUnavailable. Arrow wraps Lance's I/O errors as ArrowInvalid."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise outage(url, "read", error) from error


def outage(url: str, doing: str, error: Exception) -> StoreError:
    """The store error for an error from Lance: distinguishes a full disk from an unreachable store and one that denies
    access."""
    state, cause = storage_state(error)
    if state == "full":
        return StoreFull(f"the disk of the sample store {url} is full: {cause}.", "Free space; nothing is lost.")
    fix = "Check `lake_url`, its credentials and permissions."
    return StoreUnavailable(f"the sample store {url} cannot be {doing}: {cause}.", fix, state)
