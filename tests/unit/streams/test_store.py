from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import lance
import pytest
from lance.commit import CommitConflictError

from core.errors import RecordError, StoreError, StoreFull, StoreUnavailable, Superseded
from streams.store import writer as writer_module
from streams.store.rows import FORMAT, Position, SampleTable, read_position, tally_of
from streams.store.sample_queries import trace
from streams.store.sample_store import SampleStore
from streams.store.writer import Claim, StoreWriter
from tests.support.samples import TOPIC, put, refusal, sample


def test_rows_and_their_position_appear_together_and_come_back_whole(store: SampleStore) -> None:
    lost = {"kind": "gap", "topic": TOPIC, "partition": 0, "offset": 4, "until": 9, "reason": "retention"}
    rows = [
        sample(0, 1),
        sample(0, 0),
        {"kind": "duplicate", "topic": TOPIC, "partition": 0, "offset": 2, "reason": "duplicate_exact"},
        refusal(0, 3),
        {**lost, "ingested_at": sample(0, 0)["ingested_at"]},
    ]
    version = put(store, rows, Position(TOPIC, 0, 10, "id-1", 9, leader_epoch=4))
    assert (store.version(), store.offsets(), store.count()) == (version, {"samples:0": 10}, 2)
    table = store.scan()
    assert table["offset"].to_pylist() == [0, 1]
    assert table["image"].to_pylist() == [b"samples:0:0", b"samples:0:1"]
    assert table["tags"].to_pylist() == [["a", "b"]] * 2
    assert table["ingested_at"].to_pylist()[0] == sample(0, 0)["ingested_at"]
    assert store.records()["kind"].to_pylist() == ["sample", "sample", "duplicate", "quarantine", "gap"]
    refused = store.quarantined_record(TOPIC, 0, 3)
    assert refused is not None and refused["original"] == b"bad"
    assert store.quarantined_record(TOPIC, 0, 0) is None
    [gap] = store.gaps()
    assert (gap["offset"], gap["until"], gap["reason"]) == (4, 9, "retention")
    position = store.positions()["samples:0"]
    assert (position.next, position.topic_id, position.published, position.leader_epoch) == (10, "id-1", 9, 4)
    assert position.epoch == 1, "it was claimed once"
    counted = {"sample": 2, "duplicate": 1, "quarantine": 1, "gap": 1, "gap_offsets": 5}
    assert counted.items() <= position.tally.items() and counted.items() <= store.tally().items()


def test_what_is_stored_while_samples_are_chosen_is_chosen_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: dict[str, Callable[[SampleStore, dict[str, int]], int]] = {
        "count": lambda store, after: store.count(after=after),
        "scan": lambda store, after: len(store.scan(after=after)),
        "addresses": lambda store, after: sum(map(len, store.addresses(["id"], after=after))),
    }
    for name, choose in ways.items():
        store = filled(tmp_path / name, [sample(0, 0)], Position(TOPIC, 0, 1))
        read = store.positions

        def stored_meanwhile(version: int | None = None, store: Any = store, read: Any = read) -> dict[str, Position]:
            known: dict[str, Position] = read(version)
            put(store, [sample(0, 1), sample(1, 0)], Position(TOPIC, 0, 2), Position(TOPIC, 1, 1))
            return known

        monkeypatch.setattr(store, "positions", stored_meanwhile)
        assert choose(store, {"samples:0": 0}) == 1, name


def test_a_pinned_version_outlives_a_cleanup_and_an_unpinned_one_does_not(store: SampleStore) -> None:
    pinned = put(store, [sample(0, 0)], Position(TOPIC, 0, 1))
    store.pin("update-1", pinned)
    first = store.size()
    other = put(store, [sample(0, 1)], Position(TOPIC, 0, 2))
    put(store, [sample(0, 2)], Position(TOPIC, 0, 3))
    on_disk = sum(file.stat().st_size for file in Path(store.url).glob("data/*"))
    assert 0 < first < store.size() < on_disk, "files of older versions are not counted"
    assert store.fragments() == 3, "positions do not count"
    lance.dataset(store.url).cleanup_old_versions(retain_versions=1, error_if_tagged_old_versions=False)
    assert (store.count(version=pinned), store.pins()) == (1, {"update-1": pinned})
    assert store.scan(version=pinned)["offset"].to_pylist() == [0]
    with pytest.raises(StoreError, match=f"no version {other}"):
        store.count(version=other)
    store.pin("update-1", store.version())
    assert store.pins() == {"update-1": store.version()}, "the same name moves"
    for _ in range(2):
        store.unpin("update-1")
    assert store.pins() == {}


def test_after_leaves_out_what_lies_before_the_offsets(store: SampleStore) -> None:
    put(store, [sample(0, n) for n in range(3)], Position(TOPIC, 0, 3))
    before = store.offsets()
    put(store, [sample(0, 3), sample(1, 0)], Position(TOPIC, 0, 4), Position(TOPIC, 1, 1))
    put(store, [sample(0, 0, "samples@1")], Position("samples@1", 0, 1))
    new = store.scan(after=before, columns=["topic", "partition", "offset"]).to_pylist()
    assert [tuple(row.values()) for row in new] == [("samples", 0, 3), ("samples", 1, 0), ("samples@1", 0, 0)]
    assert (store.count(after=before), store.count(after=store.offsets())) == (3, 0)


def test_splits_ids_and_columns_select(store: SampleStore) -> None:
    rows = [sample(0, n, split="fresh_eval" if n % 3 == 0 else "train") for n in range(9)]
    put(store, rows, Position(TOPIC, 0, 9))
    assert (store.count(split="train"), store.count(split="fresh_eval")) == (6, 3)
    assert store.scan(split="fresh_eval", columns=["offset"])["offset"].to_pylist() == [0, 3, 6]
    ids = [rows[4]["id"], rows[2]["id"], "f" * 64, "' OR 1=1 --"]
    assert store.scan(ids=ids, columns=["text"]).to_pylist() == [{"text": "text 2"}, {"text": "text 4"}]
    assert store.image(ids[:1]) == {ids[0]: b"samples:0:4"}
    assert store.scan(ids=[], columns=["id"]).num_rows == 0
    assert store.scan(ids=ids[:1], split="fresh_eval", columns=["id"]).num_rows == 0
    with pytest.raises(StoreError, match="no column"):
        store.scan(columns=["kind"])
    escaping = "x' OR 'a' = 'a"
    assert store.scan(split=escaping).num_rows == store.count(split=escaping) == 0
    assert store.count(split=escaping, after={"samples:0": 0}) == 0


@pytest.mark.parametrize("split", [None, "train", "fresh_eval"])
@pytest.mark.parametrize("having", [None, "text", "question"])
def test_what_is_counted_by_the_tally_is_what_a_scan_finds(store: SampleStore, split: Any, having: Any) -> None:
    kinds: list[dict[str, Any]] = [{}, {"text": "", "question": "what?", "answer": "that"}, {"question": "which?"}]
    rows = [sample(n % 2, n, split=("train", "fresh_eval")[n % 5 == 0], **kinds[n % 3]) for n in range(30)]
    first = put(store, rows[:11], Position(TOPIC, 0, 11), Position(TOPIC, 1, 11))
    put(store, [*rows[11:], refusal(0, 40)], Position(TOPIC, 0, 41), Position(TOPIC, 1, 30))
    for version in (first, None):
        scanned = store.scan(version, split, having=having, columns=["id"]).num_rows
        assert store.count(version, split, having=having) == scanned
        assert store.count(version, split, having=having, after={"samples:0": 0}) == scanned


def test_the_outbox_holds_refused_records_until_they_are_marked_published(store: SampleStore) -> None:
    refused = [refusal(p, n, b"x%d" % n) for p in (0, 1) for n in (5, 2)]
    put(store, refused, Position(TOPIC, 0, 6), Position(TOPIC, 1, 6))
    assert [row["original"] for row in store.outbox(Position(TOPIC, 0, 6), 10)] == [b"x2", b"x5"]
    assert [row["offset"] for row in store.outbox(Position(TOPIC, 0, 6), 1)] == [2], "the oldest first"
    assert [row["offset"] for row in store.outbox(Position(TOPIC, 0, 6, published=3), 10)] == [5]
    assert [row["offset"] for row in store.outbox(Position(TOPIC, 0, 5), 10)] == [2]
    assert store.outbox(Position(TOPIC, 0, 6, published=6), 10) == []


@pytest.mark.parametrize("damaged", ["_versions/*.manifest", "data/*"])
def test_a_store_that_cannot_be_read_is_away_and_not_empty_and_one_of_another_ratchet_is_not_touched(
    store: SampleStore, damaged: str
) -> None:
    put(store, [sample(0, 0)], Position(TOPIC, 0, 1))
    lance.dataset(store.url).update_schema_metadata({"ratchet.format": f"{FORMAT}0"}, replace=True)
    with pytest.raises(StoreError, match="another version of Ratchet"):
        SampleStore(store.lake).positions()
    lance.dataset(store.url).update_schema_metadata({"ratchet.format": FORMAT}, replace=True)
    for file in Path(store.url).glob(damaged):
        file.write_bytes(b"damaged") if "manifest" in damaged else file.unlink()
    with pytest.raises(StoreUnavailable, match=r"samples\.lance cannot be read"):
        SampleStore(store.lake).offsets()


A, B, C = "a" * 64, "ab" * 32, "c" * 64


def row(kind: str, offset: int, stream: str = "t", **values: Any) -> dict[str, Any]:
    own = {"kind": kind, "topic": stream, "partition": 0, "offset": offset}
    if kind == "sample":
        own |= {"image": b"x", "text": "a boat", "split": "train"}
    return {"ingested_at": datetime(2026, 1, 1, 0, 0, offset % 60, tzinfo=UTC), **own, **values}


ROWS = [
    row("sample", 0, id=A, source="cam"),
    row("duplicate", 1, id=A, reason="duplicate_exact", duplicate_of=A),
    row("duplicate", 2, id=B, reason="duplicate_perceptual", duplicate_of=A),
    row("quarantine", 3, reason="schema", detail="field 'x'", original=b"{}", original_headers="[]"),
    row("tombstone", 4, id=A),
    row("gap", 5, until=8, reason="retention", detail="3 offsets"),
    row("deleted", 9, id=C, reason="tombstone", detail="wish of t:0:4"),
]


@pytest.fixture
def told(tmp_path: Path) -> SampleStore:
    return filled(tmp_path, ROWS, Position("t", 0, 12))


def filled(path: Path, rows: Sequence[dict[str, Any]], *ends: Position) -> SampleStore:
    store = SampleStore(str(path / "lake"))
    store.put(rows, ends)
    return store


@pytest.mark.parametrize(
    ("place", "outcome"),
    [
        ("t:0:0", "stored"), ("t:0:1", "duplicate"), ("t:0:3", "refused"), ("t:0:4", "tombstone"), ("t:0:5", "lost"),
        ("t:0:7", "lost"), ("t:0:8", "no_record"), ("t:0:9", "deleted"), ("t:0:11", "no_record"),
        ("t:0:12", "not_read_yet"), (f"t:0:{10**18 - 1}", "not_read_yet"), ("t:7:0", "not_read_yet"),
        ("other:0:0", "not_read_yet"), ("t' OR '1'='1:0:0", "not_read_yet"),
    ],
)  # fmt: skip
def test_each_position_has_one_outcome(told: SampleStore, place: str, outcome: str) -> None:
    [receipt] = trace(told, read_position(place))
    assert (receipt.outcome, receipt.position) == (outcome, place)


def test_an_id_or_a_position_in_two_logs_finds_all_receipts(told: SampleStore, tmp_path: Path) -> None:
    for text in (A, A[:8]):
        found = [(each.offset, each.outcome) for each in trace(told, text)]
        assert found == [(0, "stored"), (1, "duplicate"), (2, "duplicate"), (4, "tombstone")]
    [twin] = trace(told, B)
    assert (twin.outcome, twin.duplicate_of) == ("duplicate", A)
    assert trace(told, "d" * 64) == []
    rows = [row("sample", 0, id=A), row("sample", 0, "t@1", id=B), row("sample", 1, id=C)]
    store = filled(tmp_path / "anew", rows, Position("t", 0, 9), Position("t@1", 0, 1))
    assert [(r.stream, r.id) for r in trace(store, ("t", 0, 0))] == [("t@1", B), ("t", A)], "the newest first"
    assert [r.id for r in trace(store, ("t@1", 0, 0))] == [B]
    assert [r.stream for r in trace(store, ("t", 0, 1))] == ["t"]
    assert [(r.stream, r.outcome) for r in trace(store, ("t", 0, 2))] == [("t@1", "not_read_yet")]


def test_what_is_no_position_or_no_id_is_refused(told: SampleStore) -> None:
    for text in ("", "t", "t:0", "t:-1:0", "t:0:x", f"t:0:{'9' * 30}", "' OR 1=1:0", "a:b:0:0"):
        with pytest.raises(RecordError, match="topic:partition:offset"):
            read_position(text)
    for text in ("", "aaaaaaa", "A" * 64, "a" * 65, "' OR 1=1"):
        with pytest.raises(RecordError, match="not a sample id"):
            trace(told, text)


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


def test_a_claim_goes_on_where_the_store_is_and_an_older_one_stores_nothing_and_is_named(
    store: SampleStore, writer: StoreWriter
) -> None:
    [first] = writer.claim([Position(TOPIC, 0, 7, "id-1", 7)])
    assert (first.position.next, first.position.epoch, first.key) == (7, 1, "samples:0")
    commit(writer, [sample(0, 7)], (first, 8))
    mine = writer.claim([Position(TOPIC, 0, 0), Position(TOPIC, 1, 3)])
    assert [(each.position.next, each.position.epoch) for each in mine] == [(8, 2), (3, 1)]
    assert mine[0].position.topic_id == "id-1"
    other = claim_of(StoreWriter(SampleTable(store.lake)), 1)
    for stored in (0, 1):
        with pytest.raises(Superseded, match="samples:1") as caught:
            commit(writer, [sample(0, 8), sample(1, 3)], (mine[0], 9), (mine[1], 4))
        assert caught.value.keys == ["samples:1"], "of several partitions only those that were claimed since"
        assert (store.count(), store.offsets()) == (1 + stored, {"samples:0": 8, "samples:1": 3 + stored})
        if not stored:
            commit(writer, [sample(1, 3)], (other, 4))
    commit(writer, [sample(0, 8)], (mine[0], 9))
    assert (store.count(), store.offsets()) == (3, {"samples:0": 9, "samples:1": 4})


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


def test_processes_that_make_the_table_and_claim_at_once_all_get_theirs(store: SampleStore) -> None:
    tables = [SampleTable(store.lake) for _ in range(4)]
    [identity] = set(at_once(4, lambda number: tables[number].identity()))
    assert len(identity[1]) == 32 and SampleTable(f"{store.lake}-2").identity() != identity
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


@pytest.mark.parametrize(
    ("error", "kind", "told", "most"),
    [
        (OSError("507 Insufficient Storage: quota exceeded"), StoreFull, "exceeded", 2),
        (OSError("Permission denied (os error 13)"), StoreUnavailable, "denied", 2),
        (OSError("connection refused"), StoreUnavailable, "refused", 2),
        (CONFLICT, StoreUnavailable, "3 conflicts", 3),
    ],
)
def test_a_store_that_takes_no_commit_is_an_outage_after_which_the_claim_still_holds(
    store: SampleStore, writer: StoreWriter, fails: Fails, monkeypatch: pytest.MonkeyPatch,
    error: Exception, kind: type[StoreError], told: str, most: int,
) -> None:  # fmt: skip
    """Each attempt may take seconds: an unavailable store is asked twice, to find out whether the first was
    executed.
    """
    claim = claim_of(writer)
    monkeypatch.setattr(writer_module, "ATTEMPTS", 3)
    tries = fails(error, most)
    with pytest.raises(kind, match=told) as caught:
        commit(writer, [sample(0, 0)], (claim, 1))
    assert type(caught.value) is kind and len(tries) == most
    commit(writer, [sample(0, 0)], (claim, 1))
    assert (store.count(), store.offsets()) == (1, {"samples:0": 1})


def test_data_files_are_written_once_however_often_the_commit_is_tried(
    store: SampleStore, writer: StoreWriter, fails: Fails
) -> None:
    claim, before = claim_of(writer), files(store)
    tries = fails(CONFLICT, 5)
    commit(writer, [sample(0, 0)], (claim, 1))
    assert (len(tries), files(store) - before) == (6, 2)
    assert (store.count(), store.offsets()) == (1, {"samples:0": 1})


def test_a_commit_whose_answer_was_lost_is_not_made_again(
    store: SampleStore, writer: StoreWriter, fails: Fails
) -> None:
    claim = claim_of(writer)
    tries = fails(OSError("connection reset"), 1, after=True)
    version = commit(writer, [sample(0, 0)], (claim, 1))
    assert (len(tries), version, store.count()) == (1, store.version(), 1)
    commit(writer, [sample(0, 1)], (claim, 2))
    assert (store.count(), store.offsets()) == (2, {"samples:0": 2})


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
