from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from core.settings.streams import Retention
from streams.store import retention
from streams.store.conditions import at_offset
from streams.store.retention import expire
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.samples import TOPIC, put, refusal, sample

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def rules(**fields: Any) -> Retention:
    return Retention(**{"keep_samples": 0, **fields})


def fill(store: SampleStore, offsets: Iterable[int], days_old: float, **fields: Any) -> None:
    when = NOW - timedelta(days=days_old)
    rows = [sample(0, offset, ingested_at=when, size=100, **fields) for offset in offsets]
    put(store, rows, Position(TOPIC, 0, rows[-1]["offset"] + 1))


def left(store: SampleStore) -> list[int]:
    return [row["offset"] for row in store.scan(columns=["offset"]).to_pylist()]


def concepts(store: SampleStore) -> Counter[str]:
    return Counter(store.scan(columns=["concept"])["concept"].to_pylist())


def test_samples_over_the_age_go_and_leave_a_receipt(store: SampleStore) -> None:
    fill(store, range(3), days_old=8)
    fill(store, range(3, 5), days_old=6)
    put(store, [refusal(0, 5)], Position(TOPIC, 0, 6))
    assert expire(store, rules(max_age_days=7), NOW) == 3
    assert left(store) == [3, 4]
    [row] = store.select(at_offset(TOPIC, 0, 1), ["kind", "reason"])
    assert (row["kind"], row["reason"]) == ("deleted", "retention")
    assert store.tally()["bytes"] == 200 and store.tally()["quarantine"] == 1
    assert expire(store, rules(max_age_days=7), NOW) == 0


def refuse(store: SampleStore, offsets: Iterable[int], days_old: float, published: int) -> None:
    when = NOW - timedelta(days=days_old)
    rows = [{**refusal(0, offset), "ingested_at": when, "size": 100} for offset in offsets]
    put(store, rows, Position(TOPIC, 0, rows[-1]["offset"] + 1, published=published))


def refused(store: SampleStore) -> list[int]:
    return sorted(row["offset"] for row in store.select("kind = 'quarantine'", ["offset"]))


def test_refused_records_over_the_age_go_once_they_are_published(store: SampleStore) -> None:
    refuse(store, range(4), days_old=8, published=3)
    refuse(store, range(4, 6), days_old=6, published=3)
    assert store.tally()["refused_bytes"] == 600
    assert expire(store, rules(max_age_days=7), NOW) == 3
    assert refused(store) == [3, 4, 5] and store.tally()["refused_bytes"] == 300
    [row] = store.select(at_offset(TOPIC, 0, 1), ["kind", "reason"])
    assert (row["kind"], row["reason"]) == ("deleted", "retention")


def test_the_bytes_of_refused_records_count(store: SampleStore) -> None:
    fill(store, range(4), days_old=2)
    refuse(store, range(4, 8), days_old=3, published=8)
    assert expire(store, rules(max_bytes=500), NOW) == 4, "they are equally old, so they go together"
    assert refused(store) == [] and left(store) == [0, 1, 2, 3]
    assert expire(store, rules(max_bytes=500), NOW) == 0


def test_the_oldest_samples_over_the_bytes_go(store: SampleStore) -> None:
    fill(store, range(3), days_old=1)
    fill(store, range(3, 6), days_old=3)
    fill(store, range(6, 9), days_old=2)
    assert expire(store, rules(max_bytes=650), NOW) == 3, "just those that are too much"
    assert left(store) == [0, 1, 2, 6, 7, 8]
    assert store.tally()["bytes"] <= 650
    assert expire(store, rules(max_bytes=650), NOW) == 0


def test_a_reservoir_stays_that_has_equally_many_of_each_concept(store: SampleStore) -> None:
    fill(store, range(100), days_old=9, concept="bus")
    fill(store, range(100, 120), days_old=9, concept="tree")
    fill(store, range(120, 123), days_old=9, concept="rare")
    fill(store, range(123, 130), days_old=1, concept="bus")
    assert expire(store, rules(max_age_days=7, keep_samples=23), NOW) == 100
    assert concepts(store) == {"bus": 17, "tree": 10, "rare": 3}


def test_what_stays_follows_from_the_store_alone(store: SampleStore, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store, range(60), days_old=9, concept="bus")
    fill(store, range(60, 80), days_old=9, concept="tree")
    limit, (_, secret) = NOW - timedelta(days=7), store.table.identity()
    first = retention._reservoir(store, secret, limit, 10)
    monkeypatch.setattr(SampleStore, "batches", _backwards(SampleStore.batches))
    assert retention._reservoir(store, secret, limit, 10) == first and len(first) == 10


def _backwards(batches: Any) -> Any:
    return lambda *given, **options: reversed([batch.slice(n, 1) for batch in batches(*given, **options)
                                               for n in range(batch.num_rows)])  # fmt: skip


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
    lates = [offset for offset in left(store) if offset >= 200]
    assert len({(offset - 200) // 40 for offset in lates}) >= 3, "of all five times, not of the first or the last"


def test_more_concepts_than_there_is_room_for_are_drawn_from(store: SampleStore) -> None:
    rows = [sample(0, n, ingested_at=NOW - timedelta(days=9), concept=f"c{n // 2}") for n in range(400)]
    put(store, rows, Position(TOPIC, 0, 400))
    assert expire(store, rules(max_age_days=7, keep_samples=30), NOW) == 370
    assert max(concepts(store).values()) == 1


def test_a_run_takes_so_many_at_most_and_the_next_one_goes_on(
    store: SampleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "IDS_AT_ONCE", 4)
    monkeypatch.setattr(retention, "MOST_AT_ONCE", 8)
    fill(store, range(10), days_old=9)
    assert [expire(store, rules(max_age_days=7), NOW) for _ in range(3)] == [8, 2, 0]
