from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import lance
import pytest
from lance.commit import CommitConflictError

from core.errors import StoreError, StoreFull, StoreUnavailable, Superseded
from streams.store import writer as writer_module
from streams.store.rows import Position, SampleTable, tally_of
from streams.store.sample_store import SampleStore
from streams.store.writer import Claim, StoreWriter
from tests.support.samples import TOPIC, put, sample

T = TypeVar("T")


@pytest.fixture
def writer(store: SampleStore) -> StoreWriter:
    return StoreWriter(store.table)


def files(store: SampleStore) -> int:
    return len(list(Path(store.url).glob("data/*")))


def claim_of(writer: StoreWriter, partition: int = 0) -> Claim:
    [claim] = writer.claim([Position(TOPIC, partition, 0)])
    return claim


def commit(writer: StoreWriter, rows: list[dict[str, Any]], *ends: tuple[Claim, int]) -> int:
    moves = []
    for claim, end in ends:
        own = [row for row in rows if row["partition"] == claim.position.partition]
        moves.append((claim, replace(claim.position, next=end, tally=claim.position.tally + tally_of(own))))
    return writer.commit(rows, moves)


def test_a_claim_starts_at_the_given_position_or_goes_on_where_the_store_is(writer: StoreWriter) -> None:
    [first] = writer.claim([Position(TOPIC, 0, 7, "id-1", 7)])
    assert (first.position.next, first.position.epoch, first.key) == (7, 1, "samples:0")
    commit(writer, [sample(0, 7)], (first, 8))
    second, new = writer.claim([Position(TOPIC, 0, 0), Position(TOPIC, 1, 3)])
    assert (second.position.next, second.position.epoch, second.position.topic_id) == (8, 2, "id-1")
    assert (new.position.next, new.position.epoch) == (3, 1)


def test_an_older_claim_stores_nothing(store: SampleStore, writer: StoreWriter) -> None:
    sleeper = claim_of(writer)
    other = claim_of(StoreWriter(SampleTable(store.lake)))
    with pytest.raises(Superseded, match="samples:0") as caught:
        commit(writer, [sample(0, 0)], (sleeper, 1))
    assert caught.value.keys == ["samples:0"]
    assert (store.count(), store.offsets()) == (0, {"samples:0": 0})
    commit(writer, [sample(0, 0)], (other, 1))
    with pytest.raises(Superseded):
        commit(writer, [sample(0, 0)], (sleeper, 1))
    assert (store.count(), store.offsets()) == (1, {"samples:0": 1})


def test_of_several_partitions_only_those_that_were_claimed_since_are_named(writer: StoreWriter) -> None:
    mine = writer.claim([Position(TOPIC, 0, 0), Position(TOPIC, 1, 0)])
    claim_of(writer, 1)
    with pytest.raises(Superseded) as caught:
        commit(writer, [sample(0, 0)], *((claim, 1) for claim in mine))
    assert caught.value.keys == ["samples:1"]
    commit(writer, [sample(0, 0)], (mine[0], 1))


def test_a_row_that_does_not_fit_the_table_leaves_nothing(store: SampleStore, writer: StoreWriter) -> None:
    put(store, [sample(0, 0)], Position(TOPIC, 0, 1))
    claim = claim_of(writer)
    with pytest.raises(Exception, match="list type"):
        commit(writer, [{**sample(0, 1), "tags": 7}], (claim, 2))
    assert (store.count(), store.offsets()) == (1, {"samples:0": 1})
    commit(writer, [sample(0, 1)], (claim, 2))
    assert (store.count(), store.offsets()) == (2, {"samples:0": 2})


def at_once(count: int, work: Callable[[int], T]) -> list[T]:
    """Results of ``work`` for each number, all started at the same moment."""
    together = threading.Barrier(count)

    def begin(number: int) -> T:
        together.wait(30)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def test_writers_of_different_partitions_commit_at_once_and_none_is_sent_back(store: SampleStore) -> None:
    rounds, workers = 8, 3
    writers = [StoreWriter(SampleTable(store.lake)) for _ in range(workers)]
    claims = [claim_of(each, partition) for partition, each in enumerate(writers)]
    before = files(store)
    for number in range(rounds):
        at_once(workers, lambda p, n=number: commit(writers[p], [sample(p, n)], (claims[p], n + 1)))  # type: ignore[misc]
    got = store.scan(columns=["partition", "offset"]).to_pylist()
    assert [tuple(row.values()) for row in got] == [(p, n) for p in range(workers) for n in range(rounds)]
    assert store.offsets() == {f"samples:{p}": rounds for p in range(workers)}
    assert files(store) - before == 2 * workers * rounds, "rows and position of a commit, once each"


def test_processes_that_claim_the_first_partitions_at_once_all_get_theirs(store: SampleStore) -> None:
    tables = [SampleTable(store.lake) for _ in range(4)]
    claims = at_once(4, lambda n: StoreWriter(tables[n]).claim([Position(TOPIC, n, 0), Position(TOPIC, 9, 0)]))
    assert store.offsets() == {f"samples:{number}": 0 for number in (0, 1, 2, 3, 9)}
    assert sorted(ninth.position.epoch for _, ninth in claims) == [1, 2, 3, 4]


Fails = Callable[..., list[bool]]


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Fails:
    """Makes this many of Lance's commits raise an error, before they are made or ``after``; the list grows with
    each.
    """

    def begin(error: Exception, times: int = 1000, after: bool = False) -> list[bool]:
        original, tries = lance.LanceDataset.commit, list[bool]()

        def fail(*given: Any, **options: Any) -> Any:
            tries.append(True)
            if len(tries) > times:
                return original(*given, **options)
            if after:
                original(*given, **options)
            raise error

        monkeypatch.setattr(lance.LanceDataset, "commit", staticmethod(fail))
        return tries

    return begin


CONFLICT = CommitConflictError("somebody was faster")


def test_data_files_are_written_once_however_often_the_commit_is_tried(
    store: SampleStore, writer: StoreWriter, fails: Fails
) -> None:
    claim, before = claim_of(writer), files(store)
    tries = fails(CONFLICT, 5)
    commit(writer, [sample(0, 0)], (claim, 1))
    assert (len(tries), files(store) - before) == (6, 2)
    assert (store.count(), store.offsets()) == (1, {"samples:0": 1})


@pytest.mark.parametrize(
    ("error", "told", "most"),
    [
        (OSError("507 Insufficient Storage: quota exceeded"), "exceeded", 2),
        (OSError("connection refused"), "refused", 2),
        (CONFLICT, "3 conflicts", 3),
    ],
)
def test_a_store_that_takes_no_commit_is_an_outage_after_which_the_claim_still_holds(
    store: SampleStore, writer: StoreWriter, fails: Fails, monkeypatch: pytest.MonkeyPatch,
    error: Exception, told: str, most: int,
) -> None:  # fmt: skip
    """Each attempt may take seconds: an unavailable store is asked twice, to find out whether the first was
    executed.
    """
    claim = claim_of(writer)
    monkeypatch.setattr(writer_module, "ATTEMPTS", 3)
    tries = fails(error, most)
    with pytest.raises(StoreUnavailable, match=told):
        commit(writer, [sample(0, 0)], (claim, 1))
    assert len(tries) == most
    commit(writer, [sample(0, 0)], (claim, 1))
    assert store.count() == 1


def test_a_commit_whose_answer_was_lost_is_not_made_again(
    store: SampleStore, writer: StoreWriter, fails: Fails
) -> None:
    claim = claim_of(writer)
    tries = fails(OSError("connection reset"), 1, after=True)
    version = commit(writer, [sample(0, 0)], (claim, 1))
    assert (len(tries), version, store.count()) == (1, store.version(), 1)
    commit(writer, [sample(0, 1)], (claim, 2))
    assert (store.count(), store.offsets()) == (2, {"samples:0": 2})


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("LanceError(IO): No space left on device (os error 28)", StoreFull),
        ("Disk quota exceeded", StoreFull),
        ("Permission denied (os error 13)", StoreUnavailable),
        ("Generic S3 error: connection refused", StoreUnavailable),
    ],
)
def test_a_full_disk_is_told_from_a_store_that_is_away(
    writer: StoreWriter, monkeypatch: pytest.MonkeyPatch, text: str, kind: type[StoreError]
) -> None:
    claim = claim_of(writer)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(text)

    monkeypatch.setattr(writer_module, "write_fragments", fail)
    with pytest.raises(StoreUnavailable) as caught:
        commit(writer, [sample(0, 0)], (claim, 1))
    assert type(caught.value) is kind


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount")
def test_a_commit_to_a_full_disk_stores_nothing_and_goes_on_once_there_is_room(tmp_path: Path) -> None:
    mounted = tmp_path / "disk"
    mounted.mkdir()
    if os.system(f"mount -t tmpfs -o size=2m tmpfs {mounted} 2>/dev/null"):
        pytest.skip("mounting is not allowed here")
    try:
        store = SampleStore(str(mounted / "lake"))
        writer = StoreWriter(store.table)
        claim = claim_of(writer)
        filler = mounted / "filler"
        filler.write_bytes(bytes(1 << 20))
        rows = [sample(0, 0, image=os.urandom(700_000)), sample(0, 1, image=os.urandom(600_000))]
        for _ in range(3):
            with pytest.raises(StoreFull):
                commit(writer, rows, (claim, 2))
        assert (store.count(), store.offsets()) == (0, {"samples:0": 0})
        filler.unlink()
        commit(writer, rows, (claim, 2))
        assert (store.count(), store.offsets()) == (2, {"samples:0": 2})
    finally:
        os.system(f"umount -l {mounted}")


def test_a_commit_scans_nothing_and_adds_one_version(
    store: SampleStore, writer: StoreWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = claim_of(writer)
    commit(writer, [sample(0, 0)], (claim, 1))
    version = store.version()

    def scanned(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a commit scanned")

    for name in ("scanner", "to_table", "count_rows", "to_batches"):
        monkeypatch.setattr(lance.LanceDataset, name, scanned)
    assert commit(writer, [sample(0, 1)], (claim, 2)) == version + 1
    assert store.version() == version + 1


def test_of_tables_that_are_made_at_once_one_stays(tmp_path: Path) -> None:
    tables = [SampleTable(str(tmp_path)) for _ in range(4)]
    [identity] = set(at_once(4, lambda number: tables[number].identity()))
    assert len(identity[1]) == 32 and SampleTable(str(tmp_path / "other")).identity() != identity
