from __future__ import annotations

import random
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from streams.store import maintenance
from streams.store import writer as writer_module
from streams.store.maintenance import Fragment, clean, compact, has_deleted_rows, index, plan
from streams.store.rows import Position, SampleTable
from streams.store.sample_store import SampleStore
from streams.store.writer import StoreWriter
from tests.support.disk import holds
from tests.support.samples import TOPIC, put, refusal, sample


def fragment(number: int, share: float, deleted: int = 0) -> Fragment:
    return Fragment(number, int(share * maintenance.FULL_ROWS), 0, deleted)


def commit_each(store: SampleStore, offsets: Iterable[int], size: int = 10, **fields: Any) -> None:
    for start in offsets:
        put(store, [sample(0, n, **fields) for n in range(start, start + size)], Position(TOPIC, 0, start + size))


def small(monkeypatch: pytest.MonkeyPatch, rows: int = 64) -> None:
    monkeypatch.setattr(maintenance, "FULL_ROWS", rows)
    monkeypatch.setattr(maintenance, "TIERS", (1 / 16, 1 / 4, 1.0))


def data(store: SampleStore) -> set[str]:
    dataset = store.table.open()
    assert dataset is not None
    return {file.path for each in dataset.get_fragments() for file in each.data_files()}


def test_small_fragments_wait_until_together_they_fill_the_next_size() -> None:
    tier = maintenance.TIERS[0]
    few = [fragment(n, tier / 4) for n in range(3)]
    assert plan(few) == []
    assert plan([*few, fragment(3, tier / 4)]) == [[0, 1, 2, 3]]


def test_a_full_fragment_is_never_touched() -> None:
    fragments = [fragment(0, 1.0), fragment(1, 1.5), *(fragment(n, 0.5) for n in (2, 3))]
    assert plan(fragments) == [[2, 3]]
    big = Fragment(9, 10, maintenance.FULL_BYTES, 0)
    assert plan([big, big]) == [], "few rows, and as large as a file gets"


def test_many_tiny_fragments_of_a_slow_stream_are_merged_whatever_their_size() -> None:
    tiny = [Fragment(n, 1, 100, 0) for n in range(maintenance.MANY)]
    assert plan(tiny[:-1]) == []
    assert plan(tiny) == [[each.id for each in tiny]]


def test_deleted_rows_are_written_out_when_asked_or_when_they_are_half_of_a_file() -> None:
    fragments = [fragment(0, 1.0, deleted=1), fragment(1, 1.0, deleted=40_000), fragment(2, 1.0)]
    assert plan(fragments) == [[1]]
    assert plan(fragments, expunge=True) == [[0], [1]]


@pytest.mark.parametrize("size", [1, 10, 40])
def test_a_byte_is_written_three_times_more_at_most_and_no_full_file_again(
    store: SampleStore, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    small(monkeypatch)
    written, committed, full = 0, 0, set[int]()
    for start in range(0, 60 * size, size):
        before = store.size()
        rows = [sample(0, n, image=random.Random(n).randbytes(8000)) for n in range(start, start + size)]
        put(store, rows, Position(TOPIC, 0, start + size))
        committed += store.size() - before
        written += compact(store)
        fragments = maintenance._fragments(store)
        assert full <= {each.id for each in fragments}, "a full fragment was rewritten"
        full |= {each.id for each in fragments if each.share >= 1}
    assert store.count() == 60 * size
    assert written <= 3 * committed
    assert store.fragments() <= 20 + len(full), "the number of small files stays bounded"


def test_merging_changes_no_row_and_no_position(store: SampleStore, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    commit_each(store, range(0, 100, 5), 5)
    put(store, [refusal(1, 0)], Position(TOPIC, 1, 1))
    before = store.scan(), store.records(), store.offsets(), store.tally()
    assert compact(store) > 0
    assert (store.scan(), store.records(), store.offsets(), store.tally()) == before


def test_commits_beside_compaction_lose_nothing(store: SampleStore, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    commit_each(store, [0], 1)
    done = threading.Event()

    def work(partition: int) -> None:
        writer = StoreWriter(SampleTable(store.lake))
        for number in range(12):
            writer.put([sample(partition, number)], [Position(TOPIC, partition, number + 1)])

    def maintain() -> None:
        own = SampleStore(store.lake)
        while not done.is_set():
            compact(own)
            index(own)

    with ThreadPoolExecutor(3) as pool:
        maintained = pool.submit(maintain)
        try:
            list(pool.map(work, (1, 2), timeout=120))
        finally:
            done.set()
        maintained.result(60)
    rows = store.scan(columns=["partition", "offset"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [(0, 0), *((p, n) for p in (1, 2) for n in range(12))]
    assert store.tally()["sample"] == 25


def test_a_merge_that_lost_a_conflict_leaves_no_file(store: SampleStore, monkeypatch: pytest.MonkeyPatch) -> None:
    commit_each(store, range(0, 40, 10))
    parts = [each.id for each in maintenance._fragments(store)]
    write: Any = vars(writer_module)["write_fragments"]

    def delete_meanwhile(*given: Any, **options: Any) -> Any:
        new = write(*given, **options)
        monkeypatch.undo()
        assert len(StoreWriter(store.table).remove("offset = 3", "deletion", "d")) == 1
        return new

    monkeypatch.setattr("streams.store.writer.write_fragments", delete_meanwhile)
    assert StoreWriter(store.table).merge(parts, 64) == 0
    assert {path.name for path in Path(store.url, "data").iterdir()} <= _referenced(store)
    assert store.count() == 39


def test_of_two_deletions_at_once_the_second_is_made_again(store: SampleStore, monkeypatch: pytest.MonkeyPatch) -> None:
    commit_each(store, range(0, 40, 10))
    commit: Any = vars(StoreWriter)["_commit"]

    def delete_meanwhile(writer: StoreWriter, *given: Any) -> int:
        monkeypatch.undo()
        assert len(StoreWriter(store.table).remove("offset = 3", "deletion", "d")) == 1
        return int(commit(writer, *given))

    monkeypatch.setattr(StoreWriter, "_commit", delete_meanwhile)
    assert len(StoreWriter(store.table).remove("offset = 5", "deletion", "d")) == 1
    assert (store.count(), store.tally()["deleted"]) == (38, 2)


def _referenced(store: SampleStore) -> set[str]:
    files = set()
    for version in store.versions():
        dataset = store.table.open(version)
        assert dataset is not None
        files |= {file.path for each in dataset.get_fragments() for file in each.data_files()}
    return files


def test_expunged_rows_are_in_no_file_once_old_versions_are_cleaned(store: SampleStore) -> None:
    commit_each(store, [0], 20, text="recognisable words")
    commit_each(store, [20], 5)
    StoreWriter(store.table).remove("text = 'recognisable words'", "deletion", "d")
    assert not has_deleted_rows(store), "a file of which all is deleted leaves the version at once"
    StoreWriter(store.table).remove("offset = 22", "deletion", "d")
    assert has_deleted_rows(store)
    assert compact(store, expunge=True) > 0
    assert not has_deleted_rows(store)
    assert holds(store.url, b"recognisable words")
    assert clean(store, timedelta(0)) > 0
    assert not holds(store.url, b"recognisable words") and not holds(store.url, sample(0, 22)["image"])
    assert holds(store.url, sample(0, 23)["image"])


def test_full_fragments_are_indexed_and_ids_are_looked_up_there(
    store: SampleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    commit_each(store, range(0, 640, 32), 32)
    compact(store)
    index(store)
    full = {each.id for each in maintenance._fragments(store) if each.share >= 1}
    assert len(full) == 10
    dataset = store.table.open()
    assert dataset is not None
    covered = {each["name"]: set(each["fragment_ids"]) for each in dataset.list_indices()}
    assert set(covered) == set(maintenance.INDEXES)
    assert all(full <= fragments for fragments in covered.values())
    wanted = sample(0, 77)["id"]
    explained = dataset.scanner(filter=f"id = '{wanted}'", columns=["offset"]).explain_plan()
    assert "ScalarIndexQuery" in explained and "by_id" in explained
    version = store.version()
    index(store)
    assert store.version() == version, "nothing is new"


def test_what_the_index_finds_is_right_after_merges_deletions_and_new_rows(
    store: SampleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    commit_each(store, range(0, 256, 32), 32)
    compact(store)
    index(store)
    writer = StoreWriter(store.table)
    writer.remove("offset IN (3, 100)", "deletion", "d")
    assert compact(store, expunge=True) > 0
    commit_each(store, range(256, 352, 32), 32)
    for _ in range(2):
        ids = {n: sample(0, n)["id"] for n in (3, 4, 99, 100, 101, 255, 256, 351)}
        found = store.scan(ids=list(ids.values()), columns=["offset"])["offset"].to_pylist()
        assert found == [4, 99, 101, 255, 256, 351]
        assert store.count_rows("kind = 'deleted'") == 2
        assert store.count(after={f"{TOPIC}:0": 250}) == 102
        compact(store)
        index(store)
