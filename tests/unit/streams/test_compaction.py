"""Which files and which records maintenance removes."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from core.settings.streams import Retention
from streams.store import maintenance
from streams.store import writer as writer_module
from streams.store.conditions import at_offset
from streams.store.maintenance import Fragment, compact, index, plan
from streams.store.retention import expire
from streams.store.rows import Position, SampleTable
from streams.store.sample_store import SampleStore
from streams.store.writer import StoreWriter
from tests.support.samples import TOPIC, put, refusal, sample


def fragment(number: int, share: float, deleted: int = 0) -> Fragment:
    return Fragment(number, int(share * maintenance.FULL_ROWS), 0, deleted)


def commit_each(store: SampleStore, offsets: Iterable[int], size: int = 10, **fields: Any) -> None:
    for start in offsets:
        put(store, [sample(0, n, **fields) for n in range(start, start + size)], Position(TOPIC, 0, start + size))


def small(monkeypatch: pytest.MonkeyPatch, rows: int = 64) -> None:
    monkeypatch.setattr(maintenance, "FULL_ROWS", rows)
    monkeypatch.setattr(maintenance, "TIERS", (1 / 16, 1 / 4, 1.0))


QUARTER = maintenance.TIERS[0] / 4
BIG = Fragment(9, 10, maintenance.FULL_BYTES, 0)
"""Few rows, and as large as a file gets."""
TINY = [Fragment(n, 1, 100, 0) for n in range(maintenance.MANY)]
DELETED = [fragment(0, 1.0, deleted=1), fragment(1, 1.0, deleted=40_000), fragment(2, 1.0)]


@pytest.mark.parametrize(
    ("fragments", "expunge", "merged"),
    [
        ([fragment(n, QUARTER) for n in range(3)], False, []),
        ([fragment(n, QUARTER) for n in range(4)], False, [[0, 1, 2, 3]]),
        ([fragment(0, 1.0), fragment(1, 1.5), fragment(2, 0.5), fragment(3, 0.5)], False, [[2, 3]]),
        ([BIG, BIG], False, []),
        (TINY[:-1], False, []),
        (TINY, False, [[each.id for each in TINY]]),
        (DELETED, False, [[1]]),
        (DELETED, True, [[0], [1]]),
    ],
    ids=[
        "small ones wait", "until together they fill the next size", "a full one is never touched", "nor a large one",
        "few of a slow stream wait", "many are merged whatever their size", "half of a file is deleted", "expunged",
    ],
)  # fmt: skip
def test_which_fragments_are_written_anew(fragments: list[Fragment], expunge: bool, merged: list[list[int]]) -> None:
    assert plan(fragments, expunge=expunge) == merged


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
    datasets: list[Any] = [store.table.open(version) for version in store.versions()]
    referenced = {file.path for each in datasets for part in each.get_fragments() for file in part.data_files()}
    assert {path.name for path in Path(store.url, "data").iterdir()} <= referenced
    assert store.count() == 39


def test_merges_and_the_index_change_no_row_and_ids_are_looked_up_in_it(
    store: SampleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    commit_each(store, range(0, 640, 32), 32)
    put(store, [refusal(1, 0)], Position(TOPIC, 1, 1))
    before = store.scan(), store.records(), store.offsets(), store.tally()
    assert compact(store) > 0
    index(store)
    assert (store.scan(), store.records(), store.offsets(), store.tally()) == before
    full = {each.id for each in maintenance._fragments(store) if each.share >= 1}
    assert len(full) == 10
    dataset = store.table.open()
    assert dataset is not None
    covered = {each["name"]: set(each["fragment_ids"]) for each in dataset.list_indices()}
    assert set(covered) == set(maintenance.INDEXES) and all(full <= fragments for fragments in covered.values())
    explained = dataset.scanner(filter=f"id = '{sample(0, 77)['id']}'", columns=["offset"]).explain_plan()
    assert "ScalarIndexQuery" in explained and "by_id" in explained
    version = store.version()
    index(store)
    assert store.version() == version, "nothing is new"
    StoreWriter(store.table).remove("offset IN (3, 100)", "deletion", "d")
    assert compact(store, expunge=True) > 0
    commit_each(store, range(640, 736, 32), 32)
    for _ in range(2):
        ids = [sample(0, n)["id"] for n in (3, 4, 99, 100, 101, 639, 640, 735)]
        assert store.scan(ids=ids, columns=["offset"])["offset"].to_pylist() == [4, 99, 101, 639, 640, 735]
        assert store.count_rows("kind = 'deleted'") == 2
        assert store.count(after={f"{TOPIC}:0": 634}) == 102
        compact(store)
        index(store)


NOW = datetime(2026, 6, 1, tzinfo=UTC)


def rules(**fields: Any) -> Retention:
    return Retention(**{"keep_samples": 0, **fields})


def fill(store: SampleStore, offsets: Iterable[int], days_old: float, **fields: Any) -> None:
    when = NOW - timedelta(days=days_old)
    rows = [sample(0, offset, ingested_at=when, size=100, **fields) for offset in offsets]
    put(store, rows, Position(TOPIC, 0, rows[-1]["offset"] + 1))


def left(store: SampleStore) -> list[int]:
    return [row["offset"] for row in store.scan(columns=["offset"]).to_pylist()]


def refuse(store: SampleStore, offsets: Iterable[int], days_old: float, published: int) -> None:
    when = NOW - timedelta(days=days_old)
    rows = [{**refusal(0, offset), "ingested_at": when, "size": 100} for offset in offsets]
    put(store, rows, Position(TOPIC, 0, rows[-1]["offset"] + 1, published=published))


def refused(store: SampleStore) -> list[int]:
    return sorted(row["offset"] for row in store.select("kind = 'quarantine'", ["offset"]))


def concepts(store: SampleStore) -> Counter[str]:
    return Counter(store.scan(columns=["concept"])["concept"].to_pylist())


def test_what_is_over_the_age_goes_and_leaves_a_receipt(store: SampleStore) -> None:
    fill(store, range(3), days_old=8)
    fill(store, range(3, 5), days_old=6)
    refuse(store, range(5, 9), days_old=8, published=8)
    refuse(store, range(9, 11), days_old=6, published=8)
    assert store.tally()["refused_bytes"] == 600
    assert expire(store, rules(max_age_days=7), NOW) == 6
    assert left(store) == [3, 4]
    assert refused(store) == [8, 9, 10], "what is not published yet stays"
    assert (store.tally()["bytes"], store.tally()["refused_bytes"]) == (200, 300)
    for offset in (1, 6):
        [row] = store.select(at_offset(TOPIC, 0, offset), ["kind", "reason"])
        assert (row["kind"], row["reason"]) == ("deleted", "retention")
    assert expire(store, rules(max_age_days=7), NOW) == 0


def test_the_oldest_over_the_bytes_go(store: SampleStore) -> None:
    fill(store, range(3), days_old=1)
    fill(store, range(3, 6), days_old=3)
    fill(store, range(6, 9), days_old=2)
    assert expire(store, rules(max_bytes=650), NOW) == 3, "just those that are too much"
    assert left(store) == [0, 1, 2, 6, 7, 8] and store.tally()["bytes"] == 600
    assert expire(store, rules(max_bytes=650), NOW) == 0
    refuse(store, range(9, 13), days_old=4, published=13)
    assert expire(store, rules(max_bytes=700), NOW) == 4, "they are equally old, so they go together"
    assert refused(store) == [] and len(left(store)) == 6
    assert expire(store, rules(max_bytes=700), NOW) == 0


def test_a_reservoir_stays_that_has_equally_many_of_each_concept(store: SampleStore) -> None:
    fill(store, range(100), days_old=9, concept="bus")
    fill(store, range(100, 120), days_old=9, concept="tree")
    fill(store, range(120, 123), days_old=9, concept="rare")
    fill(store, range(123, 130), days_old=1, concept="bus")
    assert expire(store, rules(max_age_days=7, keep_samples=23), NOW) == 100
    assert concepts(store) == {"bus": 17, "tree": 10, "rare": 3}
    rows = [sample(1, n, ingested_at=NOW - timedelta(days=9), concept=f"c{n // 2}") for n in range(400)]
    put(store, rows, Position(TOPIC, 1, 400))
    expire(store, rules(max_age_days=7, keep_samples=23), NOW)
    drawn = concepts(store) - Counter(bus=7)
    assert (drawn.total(), max(drawn.values())) == (23, 1), "of more concepts than there is room for"


def test_after_many_runs_the_reservoir_is_balanced_over_the_whole_past(store: SampleStore) -> None:
    """Each run sees only what earlier runs left, which must not favour old samples."""
    keep = rules(max_age_days=7, keep_samples=20)
    fill(store, range(200), days_old=30, concept="early")
    expire(store, keep, NOW)
    assert concepts(store) == {"early": 20}
    for number in range(5):
        fill(store, range(200 + 40 * number, 240 + 40 * number), days_old=20 - number, concept="late")
        expire(store, keep, NOW)
    assert concepts(store) == {"early": 10, "late": 10}
    times = {(offset - 200) // 40 for offset in left(store) if offset >= 200}
    assert len(times) >= 3, "of all five times, not of the first or the last"
