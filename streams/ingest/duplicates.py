"""The duplicate index: finds samples with the same content, or a similar image and the same words; also assigns the
split. It is a SQLite file per worker, filled from the store and never held in memory: some 200 bytes of disk per
sample. A lost, damaged or foreign file is rebuilt from the store. Images are similar if their perceptual hashes differ
in at most ``distance`` bits and their colours hardly (:mod:`streams.ingest.perceptual_hash`)."""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from core.errors import StoreFull, StoreUnavailable
from core.progress import track
from streams.ingest.perceptual_hash import (
    COLUMNS,
    TABLES,
    PerceptualHash,
    SplitRule,
    bands_of,
    bands_of_all,
    masks,
    similar,
)
from streams.store.conditions import IDS_PER_QUERY, is_in, quoted
from streams.store.rows import (
    RecordPosition,
    SampleTable,
    Split,
    chunks,
    name_of,
    parse_position,
    position_fragments,
    position_of,
    reading_store,
)
from streams.store.sample_queries import ValueCounts
from streams.store.sample_store import SampleStore
from streams.store.writer import MOVED

DuplicateKind = Literal["exact", "perceptual", "older"]
"""The same content; a similar image with the same words; content that was corrected by a record sent later."""
CORRECTED: Final = "corrected"
OFF: Final = -1
"""Distance that turns image comparison off."""
CANDIDATES: Final = 64
"""Images compared per band. More share words and hash only in a stream of plain images, which may then keep near
duplicates: that loses nothing."""
RECENT_VERSIONS: Final = 256
"""Versions whose transactions are read to skip rows that compaction only moved."""
CHUNK_ROWS: Final = 65_536
CACHE_KIB: Final = 32_768
CHECKPOINT_PAGES: Final = 8000
"""Pages of 4 KiB between checkpoints. In a large index a batch changes a page per sample: with SQLite's default of
1,000 every fifth commit waits for the disk."""
WAIT_SECONDS: Final = 60.0
_FORMAT: Final = "2"
_COLUMNS: Final = [
    "kind", "id", "topic", "partition", "offset", "look", "words", "split", "domain", "question", "reason", "sent_at",
]  # fmt: skip


class KnownSample(NamedTuple):
    id: bytes
    """SHA-256, 32 bytes."""
    position: str
    look: bytes | None
    """:attr:`streams.ingest.perceptual_hash.PerceptualHash.data`; None: not compared by image."""
    words: int
    domain: str = ""
    asks: bool = False
    sent: datetime | None = None


@dataclass(frozen=True, slots=True)
class Duplicate:
    kind: DuplicateKind
    id: str


class DuplicateIndex:
    """Samples to compare with. Several processes may share a file; use each object from one thread."""

    def __init__(self, path: Path | str, store: str, distance: int = 0, split: SplitRule | None = None) -> None:
        """Open the file at ``path`` (``:memory:``: none), which follows the store named ``store``. ``distance``: bits
        in which hashes of near duplicates may differ; 0: equal hashes only; :data:`OFF`: no comparison. By default
        nothing is held out. Raises StoreUnavailable if the file cannot be written."""
        self.path = path
        self.distance = distance
        self._masks = masks(distance)
        self._doubles: list[tuple[str, RecordPosition]] = []
        self._split = split or SplitRule()
        self._identity = f"{_FORMAT} {store} {distance} {blake2b(self._split.key, digest_size=8).hexdigest()}"
        self._damaged = True
        self._interrupted = False
        with self._in_use():
            self._open()

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM ids").fetchone()[0])

    def close(self) -> None:
        self._db.close()

    def interrupt(self) -> None:
        """Make :meth:`follow`, possibly running in another thread, end soon with StoreUnavailable and roll back."""
        self._interrupted = True
        self._db.interrupt()

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """A transaction: commits if the block succeeds, rolls back if it raises. Other processes that share the file
        wait. Raises StoreUnavailable or StoreFull if the file cannot be written."""
        with self._in_use():
            if self._damaged:
                self._open()
            self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            with self._in_use():
                self._db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # a full disk or damage has ended the transaction already
                self._db.execute("ROLLBACK")
            raise

    def find(self, sample: KnownSample) -> Duplicate | None:
        """The sample that this one repeats, if any. Samples with different words are never duplicates, however similar
        the images."""
        with self._in_use():
            if self._has(sample.id):
                return Duplicate("exact", sample.id.hex())
            query = "SELECT 1 FROM corrected WHERE id = ? AND sent >= ?"
            if sample.sent is not None and self._db.execute(query, (sample.id, _micros(sample.sent))).fetchone():
                return Duplicate("older", sample.id.hex())
            if self.distance == OFF or sample.look is None:
                return None
            mine = PerceptualHash.parse(sample.look)
            for band in bands_of(mine.phash, sample.words, self._masks):
                query = "SELECT id, look FROM looks WHERE band = ? LIMIT ?"
                for other, theirs in self._db.execute(query, (band, CANDIDATES)):
                    if similar(mine, PerceptualHash.parse(theirs), self.distance) and self._has(other):
                        return Duplicate("perceptual", other.hex())
        return None

    def add(self, sample: KnownSample) -> Split:
        """Add a sample that :meth:`find` does not know. Returns its side of the split."""
        with self._in_use():
            self._db.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", sample[:2])
            columns = self._split.columns(sample.look, sample.domain, sample.asks)
            side = self._split.assign(self._db, columns)
            if self.distance != OFF and sample.look is not None:
                bands = bands_of(PerceptualHash.parse(sample.look).phash, sample.words, self._masks)
                rows = [(band, sample.id, sample.look) for band in bands]
                self._db.executemany("INSERT OR IGNORE INTO looks VALUES (?, ?, ?)", rows)
            return side

    def has(self, sample_id: str) -> bool:
        with self._in_use():
            return self._has(bytes.fromhex(sample_id))

    def correct(self, sample_id: str, sent: datetime) -> None:
        """Remove a sample replaced by a record sent at ``sent``; :meth:`find` then rejects its content unless newer."""
        self._drop([sample_id])
        self._note_corrections([(bytes.fromhex(sample_id), _micros(sent))])

    def move(self, sample_id: str, position: str) -> None:
        with self._in_use():
            self._db.execute("UPDATE ids SET position = ? WHERE id = ?", (position, bytes.fromhex(sample_id)))

    def stored(self, version: int, fragment: int) -> None:
        """Note that everything added since :meth:`follow` is in this store version, whose newest fragment is
        ``fragment``, and need not be read again unless another process stored something in between."""
        with self._in_use():
            if self._meta("version") == str(version - 1):
                self._set_meta("fragment", fragment)
                self._set_meta("version", version)

    def settled(self) -> list[tuple[str, RecordPosition]]:
        """Samples that :meth:`follow` found at two positions since the last call, with the position to remove. Workers
        that do not share an index can store the same content at the same time, from two partitions. All of them choose
        the same position: the later one in position order."""
        doubles, self._doubles = self._doubles, []
        return doubles

    def follow(self, table: SampleTable) -> Any | None:
        """Add what is new in the store's newest version. Call inside :meth:`deciding`. Returns that version as a Lance
        dataset, None if there is no table yet. Raises StoreUnavailable or StoreFull if the store cannot be read, or the
        file not written."""
        dataset = table.open()
        if dataset is None:
            return None
        last, version = (int(self._meta(name) or -1) for name in ("fragment", "version"))
        if dataset.version == version:
            return dataset
        positions, moved = {each.fragment_id for each in position_fragments(dataset)}, _moved(dataset, version, last)
        fresh = [each for each in dataset.get_fragments() if each.fragment_id > last]
        with self._in_use():
            staging = Staging(self._db, self._masks, self._split)
            for fragment in track(fresh, "building the duplicate index") if last < 0 else fresh:
                if fragment.fragment_id not in positions and fragment.data_files()[0].path not in moved:
                    self._take(dataset, fragment, staging, last < 0)
            self._settle(dataset, staging.merge())
            self._set_meta("fragment", max((each.fragment_id for each in fresh), default=last))
            self._set_meta("version", int(dataset.version))
        return dataset

    def _take(self, dataset: Any, fragment: Any, staging: Staging, first: bool) -> None:
        for batch in _batches(dataset, fragment):
            if self._interrupted:
                raise StoreUnavailable(
                    f"the duplicate index {self.path} is left as it was: asked to stop.", "Start again."
                )
            table = pa.Table.from_batches([batch])
            staging.add(table.filter(pc.field("kind") == "sample"))
            if staging.full:
                self._settle(dataset, staging.merge())
            corrected = table.filter((pc.field("kind") == "deleted") & (pc.field("reason") == CORRECTED))
            given = zip(corrected["id"].to_pylist(), corrected["sent_at"].to_pylist(), strict=True)
            self._note_corrections([(bytes.fromhex(id_), _micros(sent)) for id_, sent in given if id_ and sent])
            if not first:  # on the first read nothing needs to be removed
                deleted = table.filter(pc.field("kind") == "deleted")["id"].drop_null().unique().to_pylist()
                places = self._places(dataset, deleted)  # of those that were stored again since
                self._drop([id_ for id_ in deleted if not places[id_]])

    def _settle(self, dataset: Any, doubles: Sequence[tuple[bytes, str, str]]) -> None:
        """Note samples stored at two positions. All indexes keep the first in position order. A corrected one is only
        at its new position."""
        stored = self._places(dataset, [id_.hex() for id_, _, _ in doubles])
        for id_, _, position in doubles:
            [known] = self._db.execute("SELECT position FROM ids WHERE id = ?", (id_,)).fetchone()
            if known not in stored[id_.hex()]:
                self._db.execute("UPDATE ids SET position = ? WHERE id = ?", (position, id_))
                continue
            if position not in stored[id_.hex()]:
                continue
            first, second = sorted((parse_position(known), parse_position(position)))
            self._db.execute("UPDATE ids SET position = ? WHERE id = ?", (name_of(first), id_))
            self._doubles.append((id_.hex(), second))

    def _places(self, dataset: Any, ids: Sequence[str]) -> dict[str, set[str]]:
        places: dict[str, set[str]] = {each: set() for each in ids}
        for some in chunks(ids, IDS_PER_QUERY):
            where = f"kind = 'sample' AND {is_in('id', map(quoted, some))}"
            with reading_store(dataset.uri):
                stored = dataset.to_table(columns=["id", "topic", "partition", "offset"], filter=where)
            for row in stored.to_pylist():
                places[row["id"]].add(name_of(position_of(row)))
        return places

    def _drop(self, gone: Sequence[str]) -> None:
        if not gone:
            return
        with self._in_use():
            self._db.execute("CREATE TEMP TABLE IF NOT EXISTS gone (id BLOB PRIMARY KEY)")
            self._db.executemany("INSERT INTO gone VALUES (?)", ((bytes.fromhex(each),) for each in gone))
            for name in ("ids", "looks"):  # one pass over the looks, which have no index on the ID
                self._db.execute(f"DELETE FROM {name} WHERE id IN (SELECT id FROM gone)")  # noqa: S608
            self._db.execute("DELETE FROM gone")

    def _note_corrections(self, corrected: Sequence[tuple[bytes, int]]) -> None:
        with self._in_use():
            query = "INSERT INTO corrected VALUES (?, ?) ON CONFLICT DO UPDATE SET sent = max(sent, excluded.sent)"
            self._db.executemany(query, corrected)

    def _has(self, sample: bytes) -> bool:
        return self._db.execute("SELECT 1 FROM ids WHERE id = ?", (sample,)).fetchone() is not None

    def _open(self) -> None:
        """Open the file; rebuild it if it is missing, damaged or of another store."""
        with _alone(self.path):
            try:
                self._db = self._connect()
                if self._meta("identity") == self._identity:
                    self._damaged = False
                    return
                self._db.close()
            except sqlite3.DatabaseError as error:
                if not (_is_damage(error) or "no such table" in str(error)):
                    raise  # e.g. in use by another process: no reason to discard it
            for suffix in ("", "-wal", "-shm"):
                Path(f"{self.path}{suffix}").unlink(missing_ok=True)
            self._db = self._connect()
            self._db.executescript(
                "BEGIN IMMEDIATE;"
                "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT);"
                "CREATE TABLE ids (id BLOB PRIMARY KEY, position TEXT) WITHOUT ROWID;"
                "CREATE TABLE corrected (id BLOB PRIMARY KEY, sent INTEGER) WITHOUT ROWID;"
                "CREATE TABLE looks (band INTEGER, id BLOB, look BLOB, PRIMARY KEY (band, id)) WITHOUT ROWID;"
                f"{TABLES}"
                "COMMIT;"
            )
            self._set_meta("identity", self._identity)
            self._damaged = False

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        return db

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Turn errors of the file into outages; after damage the next :meth:`deciding` rebuilds it."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            self._damaged = self._damaged or _is_damage(error)
            about = f"the duplicate index {self.path}"
            if "full" in str(error) or "No space left" in str(error):
                raise StoreFull(f"the disk of {about} is full.", "Free space; nothing is lost.") from error
            fix = "Check the folder `home`; the file may be removed."
            raise StoreUnavailable(f"{about} cannot be used: {error}.", fix) from error

    def _meta(self, name: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def _set_meta(self, name: str, value: str | int) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, str(value)))


def _micros(time: datetime) -> int:
    return int(time.timestamp() * 1_000_000)


def _batches(dataset: Any, fragment: Any) -> Iterator[pa.RecordBatch]:
    with reading_store(dataset.uri):
        rows = fragment.scanner(columns=_COLUMNS, filter="kind IN ('sample', 'deleted')", batch_size=CHUNK_ROWS)
        yield from rows.to_batches()


def _moved(dataset: Any, since: int, last: int) -> set[str]:
    """Data files with only rows moved from fragments up to ``last`` at version ``since``."""
    moved: set[str] = set()
    if since < 0 or dataset.version - since > RECENT_VERSIONS:
        return moved
    for transaction in dataset.get_transactions(int(dataset.version - since)):
        if transaction is None or not MOVED.items() <= (transaction.transaction_properties or {}).items():
            continue
        if max(transaction.operation.removed_fragment_ids, default=-1) <= last:  # otherwise some rows are new here
            moved.update(file.path for each in transaction.operation.new_fragments for file in each.files)
    return moved


@contextmanager
def _alone(path: Path | str) -> Iterator[None]:
    """Lock the file's creation: otherwise processes would discard each other's file."""
    if path == ":memory:":
        yield
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{path}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_damage(error: Exception) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def near_duplicates(store: SampleStore, distance: int) -> dict[str, ValueCounts]:
    """Count the stored samples that ``ingest.near_duplicate_distance`` would have dropped, by ``domain`` and
    ``source``. Images are compared in a temporary file, in storage order. Raises StoreUnavailable."""
    groups = ("domain", "source")
    counts = {name: ValueCounts() for name in groups}
    name, _ = store.table.identity()
    with TemporaryDirectory() as folder, closing(DuplicateIndex(Path(folder) / "looks.db", name, distance)) as index:
        for batch in store.batches("kind = 'sample'", ["id", "look", "words", *groups]):
            rows = batch.to_pylist()
            dropped = []
            with index.deciding():
                for number, row in enumerate(rows):
                    sample = KnownSample(bytes.fromhex(row["id"]), "", row["look"], row["words"] or 0)
                    found = index.find(sample)
                    if found is None:
                        index.add(sample)
                    elif found.kind == "perceptual":
                        dropped.append(number)
            for each, values in counts.items():
                values.add(batch.column(each).take(pa.array(dropped, pa.int64())))
    return counts


STAGED_ROWS: Final = 1_000_000
"""Samples sorted at once: some 150 MB of a temporary file."""


class Staging:
    """Buffers samples from the store, to insert them in the order of the index's keys. Inserting unsorted would change
    another page of the file for each: three quarters of the time, at a million samples. SQLite sorts them on disk."""

    def __init__(self, db: sqlite3.Connection, masks: Sequence[int], split: SplitRule) -> None:
        self._db = db
        self._masks = masks
        self._split = split
        self._rows = 0
        self._bands = [f"band{number}" for number in range(len(masks))]
        numbers = ", ".join(f"{name} INTEGER" for name in ("held", *COLUMNS, *self._bands))
        columns = f"id BLOB, position TEXT, look BLOB, {numbers}"
        db.execute(f"CREATE TEMP TABLE IF NOT EXISTS staged ({columns})")

    @property
    def full(self) -> bool:
        return self._rows >= STAGED_ROWS

    def add(self, samples: pa.Table) -> None:
        """Stage rows of the store with id, topic, partition, offset, look, words, split, domain and question."""
        numbers = (samples[name].cast(pa.string()) for name in ("partition", "offset"))
        positions = pc.binary_join_element_wise(samples["topic"], *numbers, ":").to_pylist()
        ids, looks = list(map(bytes.fromhex, samples["id"].to_pylist())), samples["look"].to_pylist()
        held = pc.ends_with(samples["split"], "fresh_eval").to_pylist()
        groups = (samples[name].to_pylist() for name in ("domain", "question"))
        sides = [
            self._split.columns(look, domain or "", bool(question))
            for look, domain, question in zip(looks, *groups, strict=True)
        ]
        bands = bands_of_all(looks, samples["words"].to_numpy(), self._masks)
        columns = zip(ids, positions, looks, held, *zip(*sides, strict=True), *bands, strict=True)
        marks = ", ".join("?" * (4 + len(COLUMNS) + len(self._bands)))
        self._db.executemany(f"INSERT INTO staged VALUES ({marks})", columns)  # noqa: S608
        self._rows += len(ids)

    def merge(self) -> list[tuple[bytes, str, str]]:
        """Move staged samples to the index. Returns those that it has at another position: ID, that position, and this
        one."""
        self._split.note_staged(self._db)
        before = self._db.total_changes
        self._db.execute("INSERT OR IGNORE INTO ids SELECT id, position FROM staged ORDER BY id")
        doubles: list[tuple[bytes, str, str]] = []
        if self._db.total_changes - before < self._rows:
            query = "SELECT staged.id, ids.position, staged.position FROM staged JOIN ids USING (id)"
            doubles = self._db.execute(f"{query} WHERE ids.position != staged.position").fetchall()
        if self._bands:
            looks = (f"SELECT {band} AS band, id, look FROM staged WHERE look IS NOT NULL" for band in self._bands)  # noqa: S608
            self._db.execute(f"INSERT OR IGNORE INTO looks {' UNION ALL '.join(looks)} ORDER BY band, id")
        self._db.execute("DELETE FROM staged")
        self._rows = 0
        return doubles
