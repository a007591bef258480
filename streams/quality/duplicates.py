"""Finding samples that are there already: the same content, or the same look with the same words.

The index is a SQLite file beside the worker, which it fills from the store and never holds in memory: some 200 bytes of
disk a sample. It is no truth: a file that is lost, damaged or of another store is made anew from the store.

A look matches when its perceptual hashes differ in at most ``distance`` bits and its colours hardly. To find those
without comparing with all, a hash is cut into ``distance + 1`` bands: two hashes that differ in fewer bits than there
are bands agree in one of them (pigeonhole; Norouzi et al., Fast Exact Search in Hamming Space, 2012).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal

from ops.errors import StoreFull, StoreUnavailable
from streams.quality.look import PHASH_DIGITS, Look, similar
from streams.table import SampleTable, fences
from streams.writer import MOVED

Kind = Literal["exact", "perceptual"]
Words = tuple[str, str, str]
"""Text, question and answer."""
OFF: Final = -1
"""The distance at which looks are not compared."""
CANDIDATES: Final = 64
"""Looks compared with in one band. More share words and hash only in a stream of plain pictures, which may then keep
near duplicates: nothing is lost by that."""
RECENT_VERSIONS: Final = 256
"""Versions whose transactions are read to leave out what compaction only moved."""
CHUNK_ROWS: Final = 65_536
CACHE_KIB: Final = 32_768
WAIT_SECONDS: Final = 60.0
_FORMAT: Final = "1"
_ALL_BITS: Final = 2**64 - 1
_SIGN: Final = 2**63
"""SQLite's integers are signed."""
_ODD: Final = 0x9E3779B97F4A7C15
_COLUMNS: Final = ["kind", "id", "look", "text", "question", "answer"]


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Why a sample is a duplicate, and of which sample."""

    kind: Kind
    id: str


class DuplicateIndex:
    """Samples to compare with. Several processes may share a file; use each object from one thread."""

    def __init__(self, path: Path | str, store: str, distance: int = 0) -> None:
        """
        Args:
            path: the file; ``:memory:`` for none.
            store: name of the store that it follows.
            distance: bits in which the hashes of near duplicates may differ; 0 wants equal ones, :data:`OFF` none.

        Raises:
            StoreUnavailable: the file cannot be written.
        """
        self.path = path
        self.distance = distance
        self._bands = _bands(distance)
        self._identity = f"{_FORMAT} {store} {distance}"
        with _errors_named(path):
            self._open()

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM ids").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """What is added inside is kept when the block ends well, and forgotten when it raises.

        Other processes that share the file wait meanwhile.

        Raises:
            StoreUnavailable, StoreFull: the file cannot be written; nothing was added.
        """
        with _errors_named(self.path):
            self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        with _errors_named(self.path):
            self._db.execute("COMMIT")

    def find(self, sample_id: str, look: str, words: Words) -> Duplicate | None:
        """The sample that this one repeats, if any. Other words are never a duplicate, however alike the images."""
        with _errors_named(self.path):
            if self._has(bytes.fromhex(sample_id)):
                return Duplicate("exact", sample_id)
            if self.distance == OFF:
                return None
            mine = Look.parse(look)
            query = "SELECT id, look FROM looks WHERE band = ? LIMIT ?"
            for band in self._bands_of(look, words):
                for other, theirs in self._db.execute(query, (band, CANDIDATES)):
                    if similar(mine, Look.parse(theirs), self.distance) and self._has(other):
                        return Duplicate("perceptual", other.hex())
        return None

    def add(self, sample_id: str, look: str, words: Words) -> None:
        """Remember a sample."""
        self._insert([(bytes.fromhex(sample_id), look, words)])

    def follow(self, table: SampleTable) -> None:
        """Take in what the newest version of the store holds beyond what is known. Call inside :meth:`deciding`."""
        dataset = table.open()
        if dataset is None:
            return
        last, version = (int(self._meta(name) or -1) for name in ("fragment", "version"))
        if dataset.version == version:
            return
        positions, moved = {each.fragment_id for each in fences(dataset)}, _moved(dataset, version)
        fresh = [each for each in dataset.get_fragments() if each.fragment_id > last]
        with _errors_named(self.path):
            for fragment in fresh:
                if fragment.fragment_id not in positions and fragment.data_files()[0].path not in moved:
                    self._take(dataset, fragment)
            self._set_meta("fragment", max((each.fragment_id for each in fresh), default=last))
            self._set_meta("version", int(dataset.version))

    def _take(self, dataset: Any, fragment: Any) -> None:
        rows = fragment.scanner(columns=_COLUMNS, filter="kind IN ('sample', 'deleted')", batch_size=CHUNK_ROWS)
        for batch in rows.to_batches():
            kinds, ids, looks, *words = (batch[name].to_pylist() for name in _COLUMNS)
            samples = sorted(
                (bytes.fromhex(sample), look, said)
                for kind, sample, look, said in zip(kinds, ids, looks, zip(*words, strict=True), strict=True)
                if kind == "sample"
            )
            self._insert(samples)
            for sample in (name for kind, name in zip(kinds, ids, strict=True) if kind == "deleted" and name):
                if not dataset.count_rows(filter=f"kind = 'sample' AND id = '{bytes.fromhex(sample).hex()}'"):
                    self._db.execute("DELETE FROM ids WHERE id = ?", (bytes.fromhex(sample),))

    def _insert(self, samples: Iterable[tuple[bytes, str, Words]]) -> None:
        rows = list(samples)
        with _errors_named(self.path):
            self._db.executemany("INSERT OR IGNORE INTO ids VALUES (?)", ((sample,) for sample, _, _ in rows))
            if self.distance != OFF:
                bands = sorted(
                    (band, sample, look) for sample, look, words in rows if look for band in self._bands_of(look, words)
                )
                self._db.executemany("INSERT OR IGNORE INTO looks VALUES (?, ?, ?)", bands)

    def _has(self, sample: bytes) -> bool:
        return self._db.execute("SELECT 1 FROM ids WHERE id = ?", (sample,)).fetchone() is not None

    def _bands_of(self, look: str, words: Words) -> list[int]:
        """One number for each band: of the words and of the hash's bits there."""
        text, question, answer = words
        digest = blake2b(f"{len(text)} {len(question)} {text}{question}{answer}".encode(), digest_size=8).digest()
        seed, phash = int.from_bytes(digest, "big"), int(look[:PHASH_DIGITS], 16)
        return [
            ((seed + (phash & mask) * _ODD + number) & _ALL_BITS) - _SIGN for number, mask in enumerate(self._bands)
        ]

    def _open(self) -> None:
        self._db = self._connect()
        try:
            if self._meta("identity") == self._identity:
                return
        except sqlite3.DatabaseError:  # no index, or a damaged one
            pass
        self._db.close()
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)
        self._db = self._connect()
        self._db.executescript(
            "BEGIN IMMEDIATE;"
            "CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT);"
            "CREATE TABLE IF NOT EXISTS ids (id BLOB PRIMARY KEY) WITHOUT ROWID;"
            "CREATE TABLE IF NOT EXISTS looks (band INTEGER, id BLOB, look TEXT, PRIMARY KEY (band, id)) WITHOUT ROWID;"
            "COMMIT;"
        )
        self._set_meta("identity", self._identity)

    def _connect(self) -> sqlite3.Connection:
        if self.path != ":memory:":
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        return db

    def _meta(self, name: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def _set_meta(self, name: str, value: str | int) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, str(value)))


def _bands(distance: int) -> list[int]:
    """Masks of 64 bits that cover each bit once, ``distance + 1`` of them."""
    ends = [64 * number // (distance + 1) for number in range(distance + 2)] if distance >= 0 else []
    return [((1 << (end - start)) - 1) << start for start, end in pairwise(ends)]


def _moved(dataset: Any, since: int) -> set[str]:
    """Data files of rows that were in the store at version ``since``, and were only moved by maintenance."""
    moved: set[str] = set()
    if since < 0 or dataset.version - since > RECENT_VERSIONS:
        return moved
    for transaction in dataset.get_transactions(int(dataset.version - since)):
        if transaction is not None and MOVED.items() <= (transaction.transaction_properties or {}).items():
            moved.update(file.path for each in transaction.operation.new_fragments for file in each.files)
    return moved


@contextmanager
def _errors_named(path: Path | str) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        if "full" in str(error) or "No space left" in str(error):
            raise StoreFull(
                f"the disk of the duplicate index {path} is full.", "Free space; nothing is lost."
            ) from error
        raise StoreUnavailable(
            f"the duplicate index {path} cannot be used: {error}.", "Check the folder `home`; the file may be removed."
        ) from error
