"""The store keeps samples and positions in step, whoever writes and whenever."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ops.digests import digest_bytes
from ops.errors import StoreError
from streams.rows import SAMPLE_COLUMNS, Position, Snapshot, parse_stream, stream_name
from streams.store import SampleStore

TOPIC = "samples"


@pytest.fixture
def store(tmp_path: Path) -> SampleStore:
    return SampleStore(str(tmp_path / "lake"))


def sample(partition: int, offset: int, topic: str = TOPIC, split: str = "train") -> dict[str, Any]:
    image = f"{topic}:{partition}:{offset}".encode()
    return {
        "kind": "sample",
        "id": digest_bytes(image),
        "image": image,
        "text": f"text {offset}",
        "question": "",
        "answer": "",
        "tags": ["a", "b"],
        "ingested_at": datetime(2026, 1, 2, tzinfo=UTC),
        "split": split,
        "look": None,
        "words": 0,
        "topic": topic,
        "partition": partition,
        "offset": offset,
    }


def put(store: SampleStore, rows: Sequence[dict[str, Any]], *positions: Position) -> int:
    return store.commit(lambda snapshot: (rows, positions))


def test_a_store_that_was_never_written_is_empty_at_version_0(store: SampleStore) -> None:
    assert (store.version(), store.count(), store.offsets(), store.fragments()) == (0, 0, {}, 0)
    assert store.scan().column_names == list(SAMPLE_COLUMNS)
    assert store.scan(version=0).num_rows == store.records().num_rows == store.compact() == 0
    assert store.image([]) == {}


def test_samples_and_offsets_appear_together(store: SampleStore) -> None:
    version = put(store, [sample(0, 1), sample(0, 0)], Position(TOPIC, 0, 2))
    assert store.version() == version
    assert store.offsets() == {"samples:0": 2}
    table = store.scan()
    assert table["offset"].to_pylist() == [0, 1]
    assert table["image"].to_pylist() == [b"samples:0:0", b"samples:0:1"]
    assert table["tags"].to_pylist() == [["a", "b"]] * 2
    assert table["ingested_at"].to_pylist()[0] == datetime(2026, 1, 2, tzinfo=UTC)


def test_a_pinned_version_does_not_change(store: SampleStore) -> None:
    pinned = put(store, [sample(0, 0)], Position(TOPIC, 0, 1))
    put(store, [sample(0, 1)], Position(TOPIC, 0, 2))
    store.compact()
    assert (store.count(version=pinned), store.count()) == (1, 2)
    assert store.offsets(pinned) == {"samples:0": 1}
    assert store.scan(version=pinned)["offset"].to_pylist() == [0]


def test_an_unknown_version_is_named(store: SampleStore) -> None:
    put(store, [sample(0, 0)], Position(TOPIC, 0, 1))
    with pytest.raises(StoreError, match="no version 77"):
        store.count(version=77)


def test_after_leaves_out_what_lies_before_the_offsets(store: SampleStore) -> None:
    put(store, [sample(0, n) for n in range(3)], Position(TOPIC, 0, 3))
    before = store.offsets()
    put(store, [sample(0, 3), sample(1, 0)], Position(TOPIC, 0, 4), Position(TOPIC, 1, 1))
    put(store, [sample(0, 0, "samples@1")], Position("samples@1", 0, 1))
    new = store.scan(after=before, columns=["topic", "partition", "offset"]).to_pylist()
    assert [tuple(row.values()) for row in new] == [("samples", 0, 3), ("samples", 1, 0), ("samples@1", 0, 0)]
    assert store.count(after=before) == 3
    assert store.count(after=store.offsets()) == 0


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


def test_a_split_name_cannot_escape_its_quotes(store: SampleStore) -> None:
    put(store, [sample(0, 0)], Position(TOPIC, 0, 1))
    assert store.count(split="x' OR 'a' = 'a") == 0


def test_refused_and_repeated_records_are_accounted_for_but_are_no_samples(store: SampleStore) -> None:
    rows = [
        sample(0, 0),
        {"kind": "duplicate", "topic": TOPIC, "partition": 0, "offset": 1, "reason": "duplicate_exact"},
        {"kind": "quarantine", "topic": TOPIC, "partition": 0, "offset": 2, "reason": "not_json"},
    ]
    put(store, rows, Position(TOPIC, 0, 3))
    assert store.count() == store.scan().num_rows == 1
    assert store.records()["kind"].to_pylist() == ["sample", "duplicate", "quarantine"]


def test_the_outbox_holds_refused_records_until_they_are_marked_published(store: SampleStore) -> None:
    refused = [
        {"kind": "quarantine", "topic": TOPIC, "partition": p, "offset": n, "original": b"x%d" % n}
        for p in (0, 1)
        for n in (5, 2)
    ]
    put(store, refused, Position(TOPIC, 0, 6), Position(TOPIC, 1, 6))
    assert [row["original"] for row in store.outbox(Position(TOPIC, 0, 6))] == [b"x2", b"x5"]
    assert [row["offset"] for row in store.outbox(Position(TOPIC, 0, 6, published=3))] == [5]
    assert store.outbox(Position(TOPIC, 0, 6, published=6)) == []


def test_a_commit_that_fails_leaves_nothing(store: SampleStore) -> None:
    put(store, [sample(0, 0)], Position(TOPIC, 0, 1))

    def give_up(snapshot: Snapshot) -> Any:
        raise LookupError("no longer ours")

    with pytest.raises(LookupError):
        store.commit(give_up)
    with pytest.raises(Exception, match="list type"):
        put(store, [{**sample(0, 1), "tags": 7}], Position(TOPIC, 0, 2))
    assert (store.count(), store.offsets()) == (1, {"samples:0": 1})


def test_of_two_writers_on_one_position_the_second_sees_the_first(store: SampleStore) -> None:
    put(store, [sample(0, 0)], Position(TOPIC, 0, 1))
    seen: list[int] = []

    def slow(snapshot: Snapshot) -> Any:
        seen.append(snapshot.positions["samples:0"].next)
        if len(seen) == 1:  # another process stores the same records meanwhile
            put(store, [sample(0, 1)], Position(TOPIC, 0, 2))
        start = snapshot.positions["samples:0"].next
        return [sample(0, n) for n in range(start, 2)], [Position(TOPIC, 0, 2)]

    store.commit(slow)
    assert seen == [1, 2]
    assert store.scan(columns=["offset"])["offset"].to_pylist() == [0, 1]


def test_writers_at_once_lose_nothing_and_store_nothing_twice(store: SampleStore) -> None:
    rounds = 8

    def write(partition: int) -> None:
        for number in range(rounds):
            put(store, [sample(partition, number)], Position(TOPIC, partition, number + 1))

    def compact() -> None:
        for _ in range(4):
            store.compact()

    threads = [threading.Thread(target=write, args=(p,)) for p in range(3)]
    threads.append(threading.Thread(target=compact))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    got = store.scan(columns=["partition", "offset"]).to_pylist()
    assert [tuple(row.values()) for row in got] == [(p, n) for p in range(3) for n in range(rounds)]
    assert store.offsets() == {f"samples:{p}": rounds for p in range(3)}


def test_compaction_keeps_samples_offsets_and_the_fence(store: SampleStore) -> None:
    for number in range(10):
        put(store, [sample(0, number)], Position(TOPIC, 0, number + 1, "id-1", number))
    before = store.scan()
    assert store.fragments() == 11
    assert store.compact(keep=timedelta(0)) == 2
    assert store.scan().equals(before)
    assert store.snapshot().positions["samples:0"] == Position(TOPIC, 0, 10, "id-1", 9)
    put(store, [sample(0, 10)], Position(TOPIC, 0, 11))
    assert (store.count(), store.offsets()) == (11, {"samples:0": 11})


def test_only_the_newest_generation_of_a_topic_is_read_on() -> None:
    positions = [Position(TOPIC, 0, 9), Position("samples@2", 0, 1), Position("samples@10", 0, 4)]
    positions += [Position(TOPIC, 1, 5), Position("other", 0, 3)]
    snapshot = Snapshot(1, {each.key: each for each in positions})
    assert snapshot.of_topic(TOPIC) == {0: positions[2], 1: positions[3]}


def test_stream_names_go_both_ways() -> None:
    assert stream_name("t", 0) == "t"
    assert parse_stream(stream_name("t.x-y", 3)) == ("t.x-y", 3)


def test_the_size_is_that_of_the_files_of_the_latest_version(store: SampleStore) -> None:
    assert store.size() == 0
    put(store, [sample(0, n) for n in range(20)], Position(TOPIC, 0, 20))
    first = store.size()
    put(store, [sample(0, n) for n in range(20, 40)], Position(TOPIC, 0, 40))
    assert 0 < first < store.size()
    on_disk = sum(file.stat().st_size for file in Path(store.url).glob("data/*"))
    assert store.size() <= on_disk  # files of older versions are not counted
