from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from core.errors import ConfigError
from core.ledger import Ledger
from core.settings.streams import Ingest
from streams.ingest.validate import Received, Rules, validate
from streams.store.deletion import (
    Selected,
    count_selected,
    is_tombstone,
    remove,
    request_deletion,
    take_tombstones,
)
from streams.store.rows import Position, record_key
from streams.store.sample_store import SampleStore
from streams.store.writer import StoreWriter
from tests.support.samples import TOPIC, put, refusal, sample
from tests.unit.streams.conftest import Outage

LONG_AGO = datetime(2026, 1, 2, tzinfo=UTC)
LONG_KEY = b"k" * 300


def ask(ledger: Ledger, **selector: str) -> Any:
    return request_deletion(ledger, selector, actor="ann", reason="asked to")


def left(store: SampleStore) -> list[tuple[int, int]]:
    rows = store.select("kind IN ('sample', 'quarantine')", ["partition", "offset"])
    return sorted((row["partition"], row["offset"]) for row in rows)


@pytest.mark.parametrize(
    ("selector", "gone"),
    [
        ({"id": sample(0, 0)["id"]}, {0}),
        ({"source": "o'cam"}, {1, 5}),
        ({"concept": "bus"}, {2, 3}),
        ({"concept": "bus", "domain": "streets"}, {2}),
        ({"key": b"key-4".hex()}, {4}),
        ({"key": LONG_KEY.hex()}, {6}),
        ({"key": b"refused".hex()}, {5}),
        ({"record": f"{TOPIC}:0:5"}, {5}),
        ({"concept": "bus", "before": "2026-01-03"}, {2}),
    ],
)
def test_each_field_selects_what_it_names(
    store: SampleStore, ledger: Ledger, selector: dict[str, str], gone: set[int]
) -> None:
    rows = [
        sample(0, 0),
        sample(0, 1, source="o'cam"),
        sample(0, 2, domain="streets", concept="bus"),
        sample(0, 3, concept="bus", label="red", ingested_at=datetime(2026, 1, 4, tzinfo=UTC)),
        sample(0, 4, key=b"key-4"),
        {**refusal(0, 5), "source": "o'cam", "original_key": b"refused"},
        sample(0, 6, key=record_key(LONG_KEY)),
    ]
    put(store, rows, Position(TOPIC, 0, 7))
    assert count_selected(store, selector) == Selected(len(gone - {5}), len(gone & {5}))
    row = ask(ledger, **selector)
    assert remove(store, ledger, [row]) == len(gone)
    assert left(store) == [(0, offset) for offset in range(7) if offset not in gone]
    after = ledger.deletion(row.id)
    assert after is not None
    assert (after.state, after.samples, after.refusals) == ("removed", len(gone - {5}), len(gone & {5}))
    assert store.tally()["sample"] == 6 - after.samples and store.tally()["quarantine"] == 1 - after.refusals


@pytest.mark.parametrize(
    ("selector", "named"),
    [
        ({}, "everything"),
        ({"colour": "red"}, "colour"),
        ({"key": "abc"}, "`key`"),
        ({"record": f"t:{2**31}:0"}, "`record`"),
        ({"record": f"t:0:{2**63}"}, "`record`"),
        ({"source": "a", "before": "0001-01-01T00:00:00+14:00"}, "`before`"),
        ({"source": "a" * 5000}, "`source`"),
    ],
)
def test_a_wrong_selector_is_refused_by_its_field_and_nothing_is_recorded(
    ledger: Ledger, selector: dict[str, str], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        ask(ledger, **selector)
    assert ledger.deletions() == []


@pytest.mark.parametrize("key", [b"user-17", b"https://cdn.example/" + b"x" * 300])
@pytest.mark.parametrize("of_this_version", [True, False])
def test_a_tombstone_removes_refused_records_whatever_the_length_of_their_key(
    store: SampleStore, ledger: Ledger, key: bytes, of_this_version: bool
) -> None:
    given = [(b"private", key), (b"private", key + b"!"), (None, key)]
    rows: list[Any] = [validate(Received(TOPIC, 0, n, *each), Rules(Ingest())) for n, each in enumerate(given)]
    if not of_this_version:
        del rows[0]["key"], rows[1]["key"]
    put(store, rows, Position(TOPIC, 0, 3))
    assert take_tombstones(store, ledger) == 1
    assert remove(store, ledger, ledger.deletions()) == 1
    assert left(store) == [(0, 1)]


def test_what_came_before_the_request_is_deleted_whenever_it_is_stored(store: SampleStore, ledger: Ledger) -> None:
    put(store, [sample(0, 0, source="cam")], Position(TOPIC, 0, 1))
    row = ask(ledger, source="cam")
    later = datetime.now(UTC) + timedelta(seconds=1)
    put(store, [sample(0, 1, source="cam", ingested_at=later)], Position(TOPIC, 0, 2))
    assert remove(store, ledger, [row]) == 1
    ledger.deletions_rewritten([row.id], store.version())
    put(store, [sample(0, 2, source="cam")], Position(TOPIC, 0, 3))  # validated before the request
    again = ledger.deletion(row.id)
    assert again is not None and again.version is not None
    assert remove(store, ledger, [again]) == 1
    after = ledger.deletion(row.id)
    assert after is not None and (after.samples, after.version) == (2, None), "its bytes are in new files"
    assert left(store) == [(0, 1)]


def tombstone(partition: int, offset: int, **fields: Any) -> dict[str, Any]:
    base = {"kind": "tombstone", "topic": TOPIC, "partition": partition, "offset": offset, "ingested_at": LONG_AGO}
    return {**base, **fields}


def test_tombstones_are_taken_once_and_many_cost_as_many_scans_as_one(
    store: SampleStore, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [sample(0, n, key=b"%d" % n) for n in range(40)]
    put(store, [*samples, *(tombstone(0, 40 + n, key=b"%d" % n) for n in range(30))], Position(TOPIC, 0, 70))
    assert take_tombstones(store, ledger) == 30
    scans = []
    for name in ("select", "batches"):
        real = getattr(SampleStore, name)
        monkeypatch.setattr(SampleStore, name, lambda *a, real=real, **k: scans.append(a) or real(*a, **k))
    assert (take_tombstones(store, ledger), scans) == (0, []), "nothing is new"
    version = store.version()
    waiting = ledger.deletions(states=["requested"], oldest_first=True)
    assert all(map(is_tombstone, waiting))
    assert remove(store, ledger, waiting) == 30
    assert len(scans) == 3 and store.version() == version + 1
    assert left(store) == [(0, n) for n in range(30, 40)]
    assert {(each.state, each.samples) for each in ledger.deletions()} == {("removed", 1)}
    # Found although data files have been rewritten since.
    put(store, [sample(1, 0, key=b"7", ingested_at=LONG_AGO - timedelta(1))], Position(TOPIC, 1, 1))
    ledger.deletions_rewritten([each.id for each in waiting], store.version())
    assert remove(store, ledger, ledger.deletions(states=["removed"])) == 1
    [again] = [each for each in ledger.deletions() if each.samples == 2]
    assert again.version is None
    assert remove(store, ledger, ()) == 0
    put(store, [tombstone(0, 70, key=b"70")], Position(TOPIC, 0, 71))
    assert take_tombstones(store, ledger) == 1 and len(ledger.deletions()) == 31


def test_a_tombstone_by_key_or_by_id_deletes_what_came_before_it(store: SampleStore, ledger: Ledger) -> None:
    early, late = LONG_AGO - timedelta(seconds=1), LONG_AGO + timedelta(seconds=1)
    rows = [
        sample(0, 0, key=b"a", ingested_at=early),
        sample(0, 1, key=b"a", ingested_at=late),  # decoded by another thread, whose clock is ahead
        sample(0, 2, key=b"b", ingested_at=late),
        tombstone(0, 3, key=b"a"),
        sample(0, 4, key=b"a", ingested_at=early),  # offsets decide, not clocks
        sample(1, 0, key=b"a", ingested_at=early),
        sample(1, 1, key=b"a", ingested_at=late),
        tombstone(1, 2, id=sample(1, 3)["id"]),
        tombstone(1, 4, id=sample(0, 2)["id"]),
    ]
    put(store, rows, Position(TOPIC, 0, 5), Position(TOPIC, 1, 5))
    assert take_tombstones(store, ledger) == 3
    assert remove(store, ledger, ledger.deletions(states=["requested"])) == 3
    # Between partitions there is no order but that of clocks: what came after the tombstone by them stays.
    assert left(store) == [(0, 2), (0, 4), (1, 1)]
    assert {row.actor for row in ledger.deletions()} == {"producer"}


def learn(ledger: Ledger, name: str, family: str, start: int, end: int) -> None:
    ledger.begin_update(
        f"u-{name}", family=family, recipe={}, seed=0, store_version=1,
        data_from={f"{TOPIC}:0": start}, data_to={f"{TOPIC}:0": end}, incumbent=None,
    )  # fmt: skip
    ledger.advance_update(f"u-{name}", "trained", adapter=name)
    ledger.advance_update(f"u-{name}", "done")


def test_the_receipt_names_the_adapters_that_learned_from_it(store: SampleStore, ledger: Ledger) -> None:
    rows = [
        sample(0, 4, source="cam"),
        sample(0, 5, source="cam", split="fresh_eval"),
        sample(0, 12, source="cam", text="", question="what?"),
    ]
    put(store, rows, Position(TOPIC, 0, 13))
    learn(ledger, "clip-early", "clip", 0, 4)
    learn(ledger, "clip-learned", "clip", 4, 10)
    learn(ledger, "clip-later", "clip", 10, 13)
    learn(ledger, "vlm-none", "vlm", 0, 12)
    learn(ledger, "vlm-learned", "vlm", 12, 13)
    row = ask(ledger, source="cam")
    remove(store, ledger, [row])
    after = ledger.deletion(row.id)
    assert after is not None and after.adapters == {
        "learned": ["clip-learned", "vlm-learned"], "may_have_replayed": ["clip-later"],
    }  # fmt: skip


def test_a_crash_between_the_store_and_the_ledger_loses_nothing_of_the_receipt_which_has_nothing_of_the_content(
    store: SampleStore, ledger: Ledger, outage: Outage
) -> None:
    secret = sample(0, 0, source="cam", text="secret words", key=b"ann@example.org")
    put(store, [secret, {**refusal(0, 1), "source": "cam"}], Position(TOPIC, 0, 2))
    learn(ledger, "clip-a", "clip", 0, 1)
    row = ask(ledger, source="cam")
    killed = outage(Ledger, "deletion_removed", RuntimeError("killed"))
    with pytest.raises(RuntimeError, match="killed"):
        remove(store, ledger, [row])
    killed.clear()
    assert left(store) == [] and ledger.deletions()[0].state == "requested"
    assert remove(store, ledger, [row]) == 0
    after = ledger.deletions()[0]
    assert (after.state, after.samples, after.refusals) == ("removed", 1, 1)
    assert after.adapters["learned"] == ["clip-a"] and after.removed_version == store.version()
    dataset = store.table.open()
    assert dataset is not None
    [receipt] = dataset.to_table(filter="kind = 'deleted' AND offset = 0").to_pylist()
    place = {"topic": TOPIC, "partition": 0, "offset": 0, "ingested_at": receipt["ingested_at"]}
    why = {"kind": "deleted", "reason": "deletion", "detail": row.id, "tags": ["text"]}
    kept = {name: value for name, value in receipt.items() if value is not None}
    assert kept == {**place, **why, "id": secret["id"], "split": "train"}


@pytest.mark.parametrize(
    ("meanwhile", "rest"),
    [
        (lambda writer: writer.put([sample(1, 0)], [Position(TOPIC, 1, 1)]), [(0, 0), (0, 2), (0, 4), (1, 0)]),
        (lambda writer: writer.remove("offset = 0", "deletion", "d"), [(0, 2), (0, 4)]),
    ],
    ids=["a worker", "another deletion"],
)
def test_a_deletion_beside_another_commit_loses_neither(
    store: SampleStore, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, meanwhile: Any, rest: list[tuple[int, int]]
) -> None:
    put(store, [sample(0, n, source="cam" if n % 2 else "eye") for n in range(6)], Position(TOPIC, 0, 6))
    row = ask(ledger, source="cam")
    commit: Any = StoreWriter._commit

    def commit_with_another_between(self: StoreWriter, *given: Any) -> int:
        monkeypatch.setattr(StoreWriter, "_commit", commit)
        meanwhile(StoreWriter(store.table))
        version: int = commit(self, *given)
        return version

    monkeypatch.setattr(StoreWriter, "_commit", commit_with_another_between)
    assert remove(store, ledger, [row]) == 3
    assert left(store) == rest
    assert store.tally()["sample"] == len(rest) and store.tally()["deleted"] == (3 if (0, 0) in rest else 4)
