from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from core.errors import StoreUnavailable
from streams.ingest import duplicates as module
from streams.ingest.duplicates import OFF, Duplicate, DuplicateIndex, KnownSample
from streams.store import maintenance
from streams.store.rows import Position, words_hash
from streams.store.sample_store import SampleStore
from streams.store.writer import StoreWriter
from tests.support.samples import TOPIC, put, sample
from tests.support.worker import Worker


def look(phash: int) -> bytes:
    return phash.to_bytes(8, "big") + b"\x80" * 27


def item(number: int, phash: int = 0, words: str = "a boat") -> KnownSample:
    return KnownSample(bytes.fromhex(name(number)), f"{TOPIC}:0:0", look(phash), words_hash(words, "", ""))


def name(number: int) -> str:
    return f"{number:064x}"


def stored_item(partition: int, offset: int) -> KnownSample:
    return KnownSample(bytes.fromhex(sample(partition, offset)["id"]), "", look(77), 0)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[DuplicateIndex]:
    with closing(DuplicateIndex(tmp_path / "duplicates.db", "store")) as opened:
        yield opened


@pytest.mark.parametrize("distance", [OFF, 0, 1, 5, 16])
def test_every_look_within_the_distance_is_found_whichever_bits_differ(distance: int) -> None:
    index = DuplicateIndex(":memory:", "store", distance)
    index.add(item(1))
    assert index.find(item(1, 0x1234, "other")) == Duplicate("exact", name(1)), "the same content, whatever its look"
    assert index.find(item(2, words="other")) is None, "other words"
    assert index.find(item(2)) == (None if distance == OFF else Duplicate("perceptual", name(1)))
    for start in range(0, 64, 3):
        bits = sum(1 << (start + step * 7) % 64 for step in range(max(0, distance)))
        assert (index.find(item(2, bits)) is None) == (distance == OFF)
        assert index.find(item(2, bits ^ (1 << (start + 1) % 64))) is None


def stored(store: SampleStore, *offsets: int, partition: int = 0) -> None:
    put(store, [sample(partition, offset) for offset in offsets], Position(TOPIC, partition, max(offsets) + 1))


def follow(index: DuplicateIndex, store: SampleStore) -> None:
    with index.deciding():
        index.follow(store.table)


def test_the_index_takes_in_only_what_is_new_in_the_store_and_nothing_of_a_reading_that_fails(
    index: DuplicateIndex, store: SampleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(index, store)
    stored(store, 0, 1)
    batches, take, taken = module._batches, DuplicateIndex._take, list[int]()

    def failing(dataset: Any, fragment: Any) -> Iterator[Any]:
        yield from batches(dataset, fragment)
        raise StoreUnavailable("away", "wait")

    monkeypatch.setattr(module, "_batches", failing)
    with pytest.raises(StoreUnavailable):
        follow(index, store)
    monkeypatch.setattr(module, "_batches", batches)
    assert index._db.execute("SELECT name FROM temp.sqlite_master").fetchall() == []
    follow(index, store)
    assert (len(index), index.settled()) == (2, [])
    assert index._db.execute("SELECT count(*) FROM staged").fetchone() == (0,)
    stored(store, 2, partition=1)

    def watch(self: DuplicateIndex, dataset: Any, fragment: Any, *rest: Any) -> None:
        taken.append(fragment.count_rows())
        take(self, dataset, fragment, *rest)

    monkeypatch.setattr(DuplicateIndex, "_take", watch)
    for _ in range(2):
        follow(index, store)
    assert (len(index), taken) == (3, [1])
    assert index.find(stored_item(1, 2)) == Duplicate("exact", sample(1, 2)["id"])


def corrupt_pages(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "opened"),
    [
        (lambda path: path.write_bytes(b"this is no database, and was never one " * 100), ("store", 0)),
        (corrupt_pages, ("store", 0)),
        (lambda path: path.write_bytes(b""), ("store", 0)),
        (Path.unlink, ("store", 0)),
        (Path.touch, ("another", 0)),
        (Path.touch, ("store", 3)),
        (Path.touch, ("store", OFF)),
    ],
    ids=["no database", "damaged pages", "empty", "lost", "another store", "another distance", "off"],
)
def test_a_lost_or_damaged_index_or_one_of_another_store_is_made_anew(
    tmp_path: Path, store: SampleStore, damage: Callable[[Path], Any], opened: tuple[str, int]
) -> None:
    path = tmp_path / "d.db"
    stored(store, *range(50))
    with closing(DuplicateIndex(path, "store")) as index:
        follow(index, store)
        index.add(item(1))  # of which the store knows nothing
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    damage(path)
    with closing(DuplicateIndex(path, *opened)) as index:
        for _ in range(2):  # damage that shows only on use costs one attempt
            try:
                follow(index, store)
                duplicate = index.find(stored_item(0, 7))
                break
            except StoreUnavailable:
                continue
        assert (len(index), duplicate) == (50, Duplicate("exact", sample(0, 7)["id"]))


def test_two_workers_share_a_file_and_never_both_take_a_sample(tmp_path: Path) -> None:
    def work(_: int) -> list[int]:
        taken = []
        with closing(DuplicateIndex(tmp_path / "d.db", "store")) as index:
            for number in range(40):
                with index.deciding():
                    if index.find(item(number, number)) is None:
                        index.add(item(number, number))
                        taken.append(number)
        return taken

    with ThreadPoolExecutor(3) as pool:
        assert sorted(chain.from_iterable(pool.map(work, range(3)))) == list(range(40))


def test_a_file_that_another_process_holds_is_waited_for_and_never_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "d.db"
    with closing(DuplicateIndex(path, "store")) as index:
        index.add(item(1))
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.2)
    with closing(sqlite3.connect(path, isolation_level=None)) as holder:
        for statement in ("PRAGMA locking_mode=EXCLUSIVE", "BEGIN EXCLUSIVE", "SELECT * FROM meta"):
            holder.execute(statement).fetchall()
        with pytest.raises(StoreUnavailable, match="locked"):
            DuplicateIndex(path, "store")
    with closing(DuplicateIndex(path, "store")) as index:
        assert len(index) == 1


@pytest.mark.parametrize("distance", [0, 3])
def test_what_is_read_from_the_store_is_found_as_what_was_added(store: SampleStore, distance: int) -> None:
    rows = [
        sample(0, offset) | {"look": look((offset * 0x9E3779B97F4A7C15) % 2**63), "words": -offset}
        for offset in range(50)
    ]
    rows[7]["look"] = None
    put(store, rows, Position(TOPIC, 0, 50))
    added, read = DuplicateIndex(":memory:", "store", distance), DuplicateIndex(":memory:", "store", distance)
    for row in rows:
        added.add(KnownSample(bytes.fromhex(row["id"]), f"{TOPIC}:0:{row['offset']}", row["look"], row["words"]))
    follow(read, store)
    for table in ("ids", "looks"):
        query = f"SELECT * FROM {table}"
        assert read._db.execute(query).fetchall() == added._db.execute(query).fetchall() != []


SAME = 1


@pytest.fixture
def workers(tmp_path: Path) -> tuple[Worker, Worker]:
    return Worker(tmp_path, 0), Worker(tmp_path, 1)


def commit(worker: Worker, *seeds: int) -> None:
    worker.take(*seeds)
    worker.commit()


def store_at_once(first: Worker, second: Worker, *seeds: int) -> None:
    """Both decide before either commits."""
    together = threading.Barrier(2)

    def store(worker: Worker) -> None:
        real: Any = worker.writer.commit

        def after_both_decided(*given: Any) -> Any:
            together.wait(30)
            worker.writer.commit = real  # type: ignore[method-assign]
            return real(*given)

        worker.writer.commit = after_both_decided  # type: ignore[method-assign]
        commit(worker, *seeds)

    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(store, worker) for worker in (first, second)]:
            each.result(60)


def kinds(store: SampleStore) -> list[tuple[int, str]]:
    return [(row["partition"], row["kind"]) for row in store.records().to_pylist()]


@pytest.mark.parametrize("noticing", [0, 1])
def test_whoever_notices_first_makes_the_later_position_a_duplicate(
    workers: tuple[Worker, Worker], tmp_path: Path, noticing: int
) -> None:
    store_at_once(*workers, SAME)
    assert kinds(workers[0].store) == [(0, "sample"), (1, "sample")], "neither can know"
    noticed, other = workers[noticing], workers[1 - noticing]
    commit(noticed, 2)
    store = noticed.store
    [duplicate] = [row for row in store.records().to_pylist() if row["kind"] == "duplicate"]
    assert (duplicate["partition"], duplicate["offset"], duplicate["reason"]) == (1, 0, "duplicate_exact")
    assert duplicate["duplicate_of"] == duplicate["id"]
    assert (store.tally()["sample"], store.tally()["duplicate"]) == (2, 1)
    commit(other, 3)
    assert (store.tally()["sample"], store.tally()["duplicate"]) == (3, 1), "the other one has nothing left to do"
    for worker in (*workers, Worker(tmp_path, 2)):
        commit(worker, SAME)
    assert (store.tally()["sample"], store.tally()["duplicate"]) == (3, 4), "it is known to all from then on"


def test_both_may_notice_at_once(workers: tuple[Worker, Worker]) -> None:
    store_at_once(*workers, SAME, 2, 3)
    store_at_once(*workers, 4)
    for worker in workers:  # a conflict between them may leave some to the next batch
        commit(worker, 10 + worker.partition)
    store = workers[0].store
    ids = store.scan(columns=["id"])["id"].to_pylist()
    assert len(ids) == len(set(ids)) == store.tally()["sample"] == 6
    assert [partition for partition, kind in kinds(store) if kind == "duplicate"] == [1] * 4


def test_a_double_that_was_deleted_or_rows_that_were_merged_meanwhile_are_no_doubles(
    workers: tuple[Worker, Worker],
) -> None:
    store_at_once(*workers, SAME)
    busy, idle = workers
    store = busy.store
    [sample_id] = set(store.scan(columns=["id"])["id"].to_pylist())
    assert len(StoreWriter(store.table).remove(f"id = '{sample_id}'", "deletion", "d")) == 2
    for worker in workers:
        commit(worker, 5 + worker.partition)
    assert (store.tally()["sample"], store.tally()["duplicate"], store.tally()["deleted"]) == (2, 0, 2)
    commit(busy, SAME)
    assert store.tally()["sample"] == 3, "sent again after its deletion, it is a sample again"
    commit(busy, 2)
    parts = [each.id for each in maintenance._fragments(store)]
    assert StoreWriter(store.table).merge(parts, 64) > 0
    commit(idle, 2, 9)
    assert [kind for partition, kind in kinds(store) if partition == 1][-2:] == ["duplicate", "sample"]


FILL = """
import resource, sys
from streams.ingest import duplicates
duplicates.CACHE_KIB = 2048
index = duplicates.DuplicateIndex(sys.argv[1], "store")
for start in range(0, 42000, 2000):
    with index.deciding():
        for n in range(start, start + 2000):
            id_ = (n * 0x9E3779B97F4A7C15 % 2**256).to_bytes(32, "big")
            index.add(duplicates.KnownSample(id_, f"t:0:{n}", n.to_bytes(8, "big") + bytes(27), 7))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.long
def test_its_memory_does_not_grow_with_the_store(tmp_path: Path) -> None:
    """Tens of thousands of samples, whose index is larger than its cache, within a few megabytes of memory."""
    command = [sys.executable, "-c", FILL, str(tmp_path / "d.db")]
    first, *_, last = map(int, subprocess.check_output(command, text=True).split())
    assert last - first < 8 * 1024, "KiB, of twenty times the samples"
    assert (tmp_path / "d.db").stat().st_size > 4 << 20
