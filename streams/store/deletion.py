"""Deletion of samples from the store, its old versions and the quarantine rows; the catalog and replay follow the
store. A *selector* names at least one of the following fields; all that it names must match:

    id        the sample's ID, 64 hex digits
    source    origin, as producers state it; also of quarantined records
    domain, concept, label
    key       the record's key, in hex
    record    topic:partition:offset, also of a quarantined record
    before    only what was ingested before this time (ISO 8601)
    until     topic:partition:offset: in this partition, offsets before it; in others, ``before`` applies

Selectors select records. A sample that several records sent, with their own keys, stays while one of them is not
selected: it passes to that record and takes over its metadata. A tombstone in the topic (a null value with the record's
key, or with the header ``ratchet_id``) deletes what came before it: its selector is a key or an ID, with the bounds
that ingest gave it.

Old object versions in a bucket with versioning are deleted where the bucket allows it; otherwise the deletion is
``held``, and the receipt says what remains and until when. Not deleted: the topic and the quarantine topic (their
retention ends it), and the weights of adapters that learned from a sample, which the receipt names.
"""

from __future__ import annotations

import errno
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from core.artifacts.object_store import open_filesystem
from core.digests import digest12, digest_json
from core.errors import SelectorError
from core.ledger import DeletionRow, Ledger
from streams.store.conditions import IDS_PER_QUERY, SENT, at_offset, hexadecimal, is_in, moment, quoted
from streams.store.rows import RecordPosition, chunks, name_of, outage, parse_position, position_of, record_key
from streams.store.sample_store import SampleStore
from streams.store.writer import DELETION, StoreWriter

FIELDS: Final = ("id", "source", "domain", "concept", "label", "key", "record", "before", "until")
BOUNDS: Final = ("before", "until")
TOMBSTONES: Final = "tombstone "
MAX_CHARS: Final = 4096
"""Per field. Record keys may be long; sample texts are shorter."""
ROWS_AT_ONCE: Final = 2000
UPDATES: Final = 10_000
"""The newest updates searched for adapters that learned from a sample."""
_COLUMNS: Final = ["kind", "topic", "partition", "offset", "id", "key", "original_key", "ingested_at"]
_SELECTORS: Final = ({"key", "before", "until"}, {"id", "before", "until"})
_HEX = re.compile(r"(?:[0-9a-f]{2})+")
_ID = re.compile(r"[0-9a-f]{64}")
_NUMBERS: Final = (2**31, 2**63)


@dataclass(frozen=True, slots=True)
class Selected:
    samples: int
    refusals: int


def request_deletion(ledger: Ledger, selector: Mapping[str, str], *, actor: str, reason: str) -> DeletionRow:
    """Request a deletion, which maintenance carries out. Raises SelectorError."""
    chosen = {name: value for name, value in selector.items() if value}
    condition(chosen)
    now = datetime.now(UTC)
    # Later records are not included: otherwise a source could never be used again.
    chosen.setdefault("before", now.isoformat())
    return ledger.request_deletion(f"deletion-{digest12(digest_json(chosen))}", chosen, actor=actor, reason=reason)


def count_selected(store: SampleStore, selector: Mapping[str, str]) -> Selected:
    where = condition({name: value for name, value in selector.items() if value})
    return Selected(*(store.count_rows(f"kind = '{kind}' AND {where}") for kind in ("sample", "quarantine")))


def condition(selector: Mapping[str, str]) -> str:
    """The selector in Lance's SQL. Raises SelectorError naming the wrong field."""
    if unknown := set(selector) - set(FIELDS):
        name = sorted(unknown)[0]
        raise SelectorError(name, f"a deletion cannot select by `{name}`.", f"Fields: {', '.join(FIELDS)}.")
    if not set(selector) - set(BOUNDS):
        raise SelectorError(
            "selector", "a deletion of everything is not one.", f"Name one of {', '.join(FIELDS[: -len(BOUNDS)])}."
        )
    if long := [name for name, value in selector.items() if len(str(value)) > MAX_CHARS]:
        raise SelectorError(long[0], f"`{long[0]}` of the deletion is too long.", f"At most {MAX_CHARS} characters.")
    parts = [_clause(name, str(value)) for name, value in sorted(selector.items()) if name not in BOUNDS]
    return f"({' AND '.join([*parts, *_bounds(selector)])})"


def take_tombstones(store: SampleStore, ledger: Ledger) -> int:
    """Record stored tombstones as deletions. Returns the number of new ones."""
    if store.tally()["tombstone"] <= ledger.count_deletions(TOMBSTONES):
        return 0
    known, new = ledger.deletion_ids(TOMBSTONES), 0
    for batch in store.batches("kind = 'tombstone'", ["topic", "partition", "offset", "id", "key", "ingested_at"]):
        for row in batch.to_pylist():
            position = name_of(position_of(row))
            if f"{TOMBSTONES}{position}" in known:
                continue
            what = {"id": row["id"]} if row["id"] else {"key": row["key"].hex()}
            selector = {**what, "before": row["ingested_at"].isoformat(), "until": position}
            ledger.request_deletion(
                f"{TOMBSTONES}{position}", selector, actor="producer", reason="a tombstone in the topic"
            )
            new += 1
    return new


def remove(store: SampleStore, ledger: Ledger, deletions: Sequence[DeletionRow]) -> int:
    """Remove the rows that deletions, oldest first, select from the store's newest version. Returns the number of rows.
    Raises SelectorError or StoreUnavailable. Call it again until they are done: records validated before a deletion may
    be stored after it. The ledger's entries are derived from receipts in the store, so a crash in between loses
    nothing. Tombstones share one scan."""
    found = dict(_tombstone_rows(store, [each for each in deletions if is_tombstone(each)]))
    for each in deletions:
        if not is_tombstone(each):
            for batch in store.batches(f"{SENT} AND {condition(each.selector)}", ["topic", "partition", "offset"]):
                found |= {position: each.id for row in batch.to_pylist() if (position := position_of(row)) not in found}
    hit = set(found.values())
    changed = [each for each in deletions if each.state != "removed" or each.version is None or each.id in hit]
    for each in changed:
        if each.state == "removed":
            ledger.deletion_reopened(each.id)
    removed = 0
    for some in chunks(found.items(), ROWS_AT_ONCE):
        removed += len(StoreWriter(store.table).remove_rows(dict(some)))
    record_receipts(store, ledger, [each.id for each in changed])
    return removed


def record_receipts(store: SampleStore, ledger: Ledger, deletions: Sequence[str]) -> None:
    """Record in the ledger what the store has removed for some deletions, by their IDs, with one scan."""
    if not deletions:
        return
    columns = ["topic", "partition", "offset", "id", "split", "tags", "detail", "duplicate_of"]
    version = store.version()
    receipts: dict[str, list[dict[str, Any]]] = {each: [] for each in deletions}
    where = f"kind = 'deleted' AND reason = '{DELETION}' AND {is_in('detail', map(quoted, deletions))}"
    for row in store.select(where, columns, version=version):
        receipts[row["detail"]].append(row)
    earlier = _earlier(store, [row["id"] for rows in receipts.values() for row in rows if row["id"]], version)
    for name, rows in receipts.items():
        samples = [row for row in rows if row["id"]]
        refusals = [row for row in rows if not row["id"] and not row["duplicate_of"]]
        ledger.deletion_removed(
            name,
            samples=len(samples),
            refusals=len(refusals),
            adapters=adapters_of(ledger, [each for row in samples for each in (row, *earlier.get(row["id"], ()))]),
            store_version=version,
        )


def _earlier(store: SampleStore, ids: Sequence[str], version: int) -> dict[str, list[dict[str, Any]]]:
    """Receipts, by ID of a deleted sample, of records that also brought it and were deleted before it."""
    columns = ["topic", "partition", "offset", "split", "tags", "duplicate_of"]
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for some in chunks(ids, IDS_PER_QUERY):
        where = f"kind = 'deleted' AND {is_in('duplicate_of', map(quoted, some))}"
        for row in store.select(where, columns, version=version):
            found[row["duplicate_of"]].append(row)
    return found


def as_json(row: DeletionRow) -> dict[str, Any]:
    times = {name: getattr(row, name) for name in ("requested_at", "removed_at", "held_at", "done_at", "remains_until")}
    same = ("id", "state", "selector", "actor", "reason", "samples", "refusals")
    return {
        **{name: getattr(row, name) for name in same},
        "adapters": {"learned": [], "may_have_replayed": [], **row.adapters},
        "first_update_without": row.update_id,
        "remains": row.remains,
        **{name: None if time is None else time.isoformat() for name, time in times.items()},
    }


def adapters_of(ledger: Ledger, samples: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The adapters that learned from deleted samples, and those that may have replayed them since. ``samples`` are
    receipts: see :func:`streams.store.rows.deletion_row`."""
    offsets: dict[str, dict[str, list[int]]] = {"clip": defaultdict(list), "vlm": defaultdict(list)}
    for row in samples:
        for family, field in (("clip", "text"), ("vlm", "question")):
            if str(row["split"]).endswith("train") and field in (row["tags"] or ()):
                offsets[family][f"{row['topic']}:{row['partition']}"].append(row["offset"])
    for partitions in offsets.values():
        for each in partitions.values():
            each.sort()
    learned, replayed = [], []
    for update in reversed(ledger.updates(UPDATES) if any(offsets.values()) else []):
        ranges = [
            (each, update.data_from.get(key, 0), update.data_to.get(key, 0))
            for key, each in offsets[update.family].items()
        ]
        if update.adapter is None:
            continue
        if any(bisect_left(each, start) < bisect_left(each, end) for each, start, end in ranges):
            learned.append(update.adapter)
        elif any(each[0] < start for each, start, _ in ranges):
            replayed.append(update.adapter)
    # Several updates may have the same adapter: it has learned if one of them did.
    return {
        "learned": list(dict.fromkeys(learned)),
        "may_have_replayed": [name for name in dict.fromkeys(replayed) if name not in learned],
    }


def _clause(name: str, value: str) -> str:
    match name:
        case "id":
            if not _ID.fullmatch(value):
                raise SelectorError("id", "`id` of the deletion is not a sample id.", "It has 64 hex digits.")
            return f"id = {quoted(value)}"
        case "key":
            if not _HEX.fullmatch(value):
                raise SelectorError("key", "`key` of the deletion is not in hex.", "Write its bytes in hex digits.")
            key = hexadecimal(record_key(bytes.fromhex(value)) or b"")
            # Quarantined rows from earlier versions have only the original key, and a tombstone's selector may be its
            # SHA-256.
            as_it_came = f"original_key = {hexadecimal(bytes.fromhex(value))} OR sha256(original_key) = {key}"
            return f"(key = {key} OR (kind = 'quarantine' AND key IS NULL AND ({as_it_came})))"
        case "record":
            return at_offset(*_position(name, value))
        case _:
            return f"{name} = {quoted(value)}"


def _bounds(selector: Mapping[str, str]) -> list[str]:
    before = f"ingested_at < {moment(_time(selector['before']))}" if "before" in selector else ""
    if "until" not in selector:
        return [before] if before else []
    topic, partition, offset = _position("until", selector["until"])
    here = f"topic = {quoted(topic)} AND partition = {partition}"
    elsewhere = f" OR (NOT ({here}) AND {before})" if before else ""
    return [f"(({here} AND offset < {offset}){elsewhere})"]


def _position(field: str, value: str) -> RecordPosition:
    try:
        topic, partition, offset = parse_position(value)
    except ValueError:
        topic, partition, offset = "", -1, -1
    if not topic or not (0 <= partition < _NUMBERS[0] and 0 <= offset < _NUMBERS[1]):
        raise SelectorError(
            field,
            f"`{field}` of the deletion, {value[:300]!r}, is not a record.",
            "A record reads topic:partition:offset.",
        )
    return topic, partition, offset


def _time(value: str) -> datetime:
    try:
        time = datetime.fromisoformat(value)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise SelectorError(
            "before", f"`before` of the deletion, {value[:80]!r}, is not a time.", "Write 2026-01-31."
        ) from None


def is_tombstone(deletion: DeletionRow) -> bool:
    """True for a tombstone's selector: a key or an ID, with the bounds that ingest gave it."""
    return deletion.id.startswith(TOMBSTONES) and set(deletion.selector) in _SELECTORS


def _tombstone_rows(store: SampleStore, deletions: Sequence[DeletionRow]) -> Iterator[tuple[RecordPosition, str]]:
    if not deletions:
        return
    by_name: dict[str | bytes, list[DeletionRow]] = defaultdict(list)
    for each in deletions:
        selector = each.selector
        name = selector["id"] if "id" in selector else record_key(bytes.fromhex(selector["key"])) or b""
        by_name[name].append(each)
    ids = ", ".join(quoted(name) for name in by_name if isinstance(name, str))
    keys = ", ".join(hexadecimal(name) for name in by_name if isinstance(name, bytes))
    clauses = [f"id IN ({ids})"] if ids else []
    if keys:  # see `_clause` on quarantined records of earlier versions
        older = f"(original_key IN ({keys}) OR sha256(original_key) IN ({keys}))"
        clauses += [f"key IN ({keys})", f"(kind = 'quarantine' AND key IS NULL AND {older})"]
    for batch in store.batches(f"{SENT} AND ({' OR '.join(clauses)})", _COLUMNS):
        for row in batch.to_pylist():
            key = row["key"] if row["key"] is not None else record_key(row["original_key"])
            for name in (row["id"], key):
                named = by_name.get(name, ()) if name is not None else ()
                first = next((each for each in named if _covers(each.selector, row)), None)
                if first is not None:
                    yield position_of(row), first.id
                    break


def _covers(selector: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """True if a row precedes a tombstone: by offset in the same partition, by time in others."""
    topic, partition, offset = parse_position(selector["until"])
    if (row["topic"], row["partition"]) == (topic, partition):
        return bool(row["offset"] < offset)
    return bool(row["ingested_at"] < datetime.fromisoformat(selector["before"]))


AT_ONCE: Final = 1000
ASKED: Final = 20
ELSEWHERE: Final = (
    "Old versions of objects were not looked for, which is done in s3:// only: see to versioning and soft delete."
)
UNLISTED: Final = (
    "Old versions of objects were not looked for: the right s3:ListBucketVersions is missing. "
    "If the bucket has versioning, they are still there."
)


@dataclass(frozen=True, slots=True)
class OldVersion:
    key: str
    id: str
    size: int
    modified: datetime


class OldVersions:
    """Noncurrent versions of all objects in a lake. Methods raise StoreUnavailable if the object store does not
    answer."""

    def __init__(self, lake: str) -> None:
        self.unknown = ""
        """Reason why they cannot be listed; empty if they can."""
        self._lake = lake
        self._left: list[OldVersion] = []
        self._store: Any = None
        scheme = lake.partition("://")[0] if "://" in lake else "file"
        if scheme in ("s3", "s3a"):
            self._store, root = open_filesystem(lake)
            self._bucket, _, below = root.partition("/")
            self._prefix = f"{below.rstrip('/')}/" if below else ""
        elif scheme not in ("file", "memory"):
            self.unknown = ELSEWHERE

    def purge(self) -> None:
        if self._store is None:
            return
        old = self._list()
        for some in chunks(old, AT_ONCE):
            batch = [{"Key": each.key, "VersionId": each.id} for each in some]
            try:
                self._call("delete_objects", Delete={"Objects": batch, "Quiet": True})
            except PermissionError:
                break
        self._left = self._list() if old else []

    def left(self, before: datetime) -> tuple[str, datetime | None] | None:
        """Remains after :meth:`purge` of files from before a time, and until when; None if nothing."""
        left = sorted((each for each in self._left if each.modified < before), key=lambda each: each.modified)
        if not left:
            return None
        count = f"{len(left):,} old versions of objects ({sum(each.size for each in left):,} bytes) in {self._lake}"
        locks = [self._lock(each) for each in reversed(left[-ASKED:])]
        times = [each for each in locks if isinstance(each, datetime)]
        if "held" in locks:
            return f"{count}: under a legal hold.", None
        if times:
            return f"{count}: under object lock.", max(times)
        return f"{count}: they could not be deleted. Allow s3:DeleteObjectVersion.", None

    def _list(self) -> list[OldVersion]:
        try:
            return [
                OldVersion(each["Key"], each["VersionId"], int(each.get("Size") or 0), each["LastModified"])
                for page in self._pages()
                for each in page.get("Versions") or ()
                if not each["IsLatest"]
            ]
        except PermissionError:
            self.unknown = UNLISTED
            return []

    def _pages(self) -> Iterator[dict[str, Any]]:
        after: dict[str, str] = {}
        while True:
            page = self._call("list_object_versions", Prefix=self._prefix, **after)
            yield page
            if not page.get("IsTruncated"):
                return
            after = {"KeyMarker": page["NextKeyMarker"], "VersionIdMarker": page.get("NextVersionIdMarker") or ""}

    def _lock(self, version: OldVersion) -> datetime | str:
        """End of the version's lock, ``held`` for a legal hold, or empty if neither is known."""
        try:
            told = self._store.call_s3("head_object", Bucket=self._bucket, Key=version.key, VersionId=version.id)
        except OSError:
            return ""
        held = told.get("ObjectLockLegalHoldStatus") == "ON"
        until: datetime | str = told.get("ObjectLockRetainUntilDate") or ""
        return "held" if held else until

    def _call(self, method: str, **options: Any) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = self._store.call_s3(method, Bucket=self._bucket, **options)
        except PermissionError:
            raise
        except Exception as error:  # botocore and aiohttp have their own exception trees
            if getattr(error, "errno", None) == errno.ENOSYS:  # the server has no object versions
                return {}
            raise outage(self._lake, "searched for old versions", error) from error
        return answer
