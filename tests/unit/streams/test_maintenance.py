from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from core.dependencies import current
from core.errors import LedgerUnavailable, StoreUnavailable
from core.ledger import DeletionRow, Ledger
from core.ledger import rows as t
from core.ledger.indexes import INDEX_LEASE
from core.ledger.rows import IndexRow
from core.metrics.declared import INDEX_FAILING
from core.settings import Settings
from ops.cli.doctor import _indexes
from streams.store import deletion, maintenance
from streams.store.maintenance import Maintainer, wait_for_ledger
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from streams.store.writer import StoreWriter
from tests.support.disk import holds
from tests.support.kafka import wait_for
from tests.support.samples import TOPIC, put, sample
from tests.unit.streams.conftest import Outage

GAP = {
    "kind": "gap", "topic": TOPIC, "partition": 0, "offset": 5, "until": 9, "reason": "retention",
    "ingested_at": datetime(2026, 1, 2, tzinfo=UTC),
}  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.model_validate(
        {"home": tmp_path, "maintain": {"keep_seconds": 0, "seconds": 0.01}, "kafka": {"events_topic": ""}}
    )


@pytest.fixture
def store(settings: Settings) -> SampleStore:
    made = SampleStore(settings.lake)
    put(made, [sample(0, n, source="cam" if n < 2 else "eye") for n in range(4)], Position(TOPIC, 0, 4))
    return made


@pytest.fixture
def maintainer(settings: Settings, ledger: Ledger, store: SampleStore) -> Iterator[Maintainer]:
    with closing(Maintainer(settings, ledger, store)) as made:
        yield made


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """No record that was validated before a deletion is still on its way."""
    monkeypatch.setattr(maintenance, "SETTLE_SECONDS", -1.0)


def change(maintainer: Maintainer, section: str, **values: Any) -> None:
    part = getattr(maintainer.settings, section).model_copy(update=values)
    maintainer.settings = maintainer.settings.model_copy(update={section: part})


def delete(ledger: Ledger, **selector: str) -> str:
    return deletion.request_deletion(ledger, selector or {"source": "cam"}, actor="ann", reason="asked to").id


def row_of(ledger: Ledger, name: str) -> DeletionRow:
    found = ledger.deletion(name)
    assert found is not None
    return found


@pytest.mark.usefixtures("settled")
def test_a_deletion_or_a_tombstone_is_removed_and_done_when_no_file_has_it(
    maintainer: Maintainer, ledger: Ledger, store: SampleStore
) -> None:
    tombstone = {"kind": "tombstone", "topic": TOPIC, "partition": 0, "offset": 4, "id": sample(0, 3)["id"],
                 "ingested_at": datetime.now(UTC)}  # fmt: skip
    put(store, [tombstone], Position(TOPIC, 0, 5))
    name, secrets = delete(ledger), [sample(0, n)["image"] for n in (1, 3)]
    assert all(holds(store.url, each) for each in secrets)
    run = maintainer.run_once()
    assert (run.removed, run.waiting) == (3, False) and run.written > 0 and run.freed > 0
    row = row_of(ledger, name)
    assert (row.state, row.samples) == ("done", 2)
    assert row.removed_at is not None and row.done_at is not None and row.version in store.versions()
    row = row_of(ledger, f"tombstone {TOPIC}:0:4")
    assert (row.state, row.samples, row.actor) == ("done", 1, "producer")
    assert not any(holds(store.url, each) for each in secrets)
    assert store.scan(columns=["offset"])["offset"].to_pylist() == [2] and holds(store.url, sample(0, 2)["image"])
    assert [(each.action, each.actor) for each in ledger.audit_rows(subject=f"deletion {name}")] == [
        ("deleted", "maintain"), ("delete", "ann"),
    ]  # fmt: skip
    assert {event.type for event in ledger.events()} == {"ratchet.deletion.v1"}
    assert sorted(event.data["samples"] for event in ledger.events()) == [1, 2]


def test_a_deletion_is_not_done_while_old_versions_are_kept_or_records_from_before_it_may_still_be_stored(
    maintainer: Maintainer, ledger: Ledger, store: SampleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, early = delete(ledger), sample(0, 1)["image"]
    maintainer.run_once()
    assert row_of(ledger, name).state == "removed" and store.count() == 2
    late = sample(0, 4, source="cam")  # validated long ago, and stored now
    put(store, [late], Position(TOPIC, 0, 5))
    monkeypatch.setattr(maintenance, "SETTLE_SECONDS", -1.0)
    change(maintainer, "maintain", keep_seconds=3600)
    assert maintainer.run_once().removed == 1
    assert row_of(ledger, name).state == "removed" and holds(store.url, late["image"])
    assert store.count() == 2, "no reader of the newest version finds it"
    change(maintainer, "maintain", keep_seconds=0)
    maintainer.run_once()
    row = row_of(ledger, name)
    assert (row.state, row.samples) == ("done", 3)
    assert not holds(store.url, late["image"]) and not holds(store.url, early)


@pytest.mark.usefixtures("settled")
def test_a_pinned_version_keeps_the_bytes_until_the_update_is_over_or_too_late(
    maintainer: Maintainer, ledger: Ledger, store: SampleStore
) -> None:
    pinned = store.version()
    for name in ("u-over", "u-running"):
        ledger.begin_update(
            name, family="clip", recipe={}, seed=0, store_version=pinned, data_from={}, data_to={}, incumbent=None
        )
        store.pin(name, pinned)
    ledger.advance_update("u-over", "failed", error="no")  # by an updater that died before it removed the pin
    name = delete(ledger)
    for _ in range(2):
        maintainer.run_once()
    assert set(store.pins()) == {"u-running"}
    assert row_of(ledger, name).state == "removed" and pinned in store.versions()
    assert store.count(version=pinned) == 4, "the update goes on with what it was pinned to"
    store.pin("by-hand", store.version())
    put(store, [sample(0, 4)], Position(TOPIC, 0, 5))
    long_ago = datetime.now(UTC) - timedelta(hours=maintenance.PIN_HOURS, minutes=1)
    with ledger.database.write() as session:
        session.get_one(t.DeletionRow, name).removed_at = long_ago
    maintainer.run_once()
    assert set(store.pins()) == {"by-hand"}, "a version from after the deletion is left alone"
    assert pinned not in store.versions()
    assert row_of(ledger, name).state == "done" and not holds(store.url, sample(0, 1)["image"])


def test_a_second_maintainer_waits_until_the_first_lets_go_and_a_gap_is_told_once(
    maintainer: Maintainer, settings: Settings, ledger: Ledger, store: SampleStore
) -> None:
    put(store, [GAP], Position(TOPIC, 0, 9))
    for _ in range(2):
        assert not maintainer.run_once().waiting
    name = delete(ledger)
    with closing(Maintainer(settings, ledger, store)) as second:
        assert second.run_once().waiting
        assert row_of(ledger, name).state == "requested"
        maintainer.close()
        assert second.run_once().removed == 2
        assert maintainer.run_once().waiting
        [event] = ledger.events()
        assert (event.event_id, event.subject) == (f"gap-{TOPIC}:0:5", f"{TOPIC}:0")
        assert event.data == {"topic": TOPIC, "partition": 0, "from": 5, "to": 9, "reason": "retention"}
        put(store, [{**GAP, "offset": 20, "until": 21}], Position(TOPIC, 0, 21))
        second.run_once()
    assert len(ledger.events()) == 2


@contextmanager
def running(maintainer: Maintainer) -> Iterator[None]:
    stopping = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(maintainer.run, stopping)
        try:
            yield
        finally:
            stopping.set()
            run.result(60)


def test_a_store_that_is_away_is_said_once_and_tried_again(
    maintainer: Maintainer, ledger: Ledger, outage: Outage, capsys: pytest.CaptureFixture[str]
) -> None:
    name, tries = delete(ledger), [0]

    def count(*_: Any) -> bool:
        tries[0] += 1
        return True

    away = outage(deletion, "take_tombstones", StoreUnavailable("the store is away.", "Wait."), count)
    with running(maintainer):
        wait_for(lambda: tries[0] > 3, "several tries", 60)
        assert current()["store"].state == "away"
        away.clear()
        wait_for(lambda: row_of(ledger, name).state == "removed", "the deletion", 60)
    assert current()["store"].state == "ok"
    assert capsys.readouterr().err.count("the store is away") == 1


@contextmanager
def full_disk(ledger: Ledger) -> Iterator[threading.Event]:
    """SQLite may not enlarge the ledger's file before the event."""
    freed, engine = threading.Event(), ledger.database.engine

    def limit(connection: Any, *_: Any) -> None:
        pages = 2**30 if freed.is_set() else 1  # SQLite takes the present size where that is more
        connection.execute(f"PRAGMA max_page_count={pages}")

    event.listen(engine, "checkout", limit)
    yield freed
    event.remove(engine, "checkout", limit)


def test_a_ledger_whose_disk_is_full_is_an_outage_and_is_tried_again(
    maintainer: Maintainer, ledger: Ledger, store: SampleStore, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    gaps = [{**GAP, "offset": 10 * n, "until": 10 * n + 5, "topic": "x" * 200} for n in range(1, 60)]
    put(store, gaps, Position("x" * 200, 0, 1000))
    with full_disk(ledger) as freed:
        with pytest.raises(LedgerUnavailable, match="full") as caught:
            maintainer.run_once()
        assert "Bring the database back" in caught.value.fix
        with running(maintainer):
            wait_for(lambda: "is full" in " ".join("".join(capsys.readouterr()).split()), "the outage", 60)
            freed.set()
            wait_for(lambda: len(ledger.events(100)) == len(gaps), "the gaps' events", 60)
    assert not [record for record in caplog.records if record.exc_info], "an outage has no traceback"


def test_a_deletion_that_cannot_be_carried_out_holds_up_no_other(
    maintainer: Maintainer, ledger: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger.request_deletion("odd", {"colour": "red"}, actor="a newer version", reason="r")
    name = delete(ledger)
    assert maintainer.run_once().removed == 2
    assert (row_of(ledger, name).state, row_of(ledger, "odd").state) == ("removed", "requested")
    assert "odd cannot be carried out" in capsys.readouterr().err


def test_with_the_samples_of_a_callers_corrections_its_feedback_goes(maintainer: Maintainer, ledger: Ledger) -> None:
    for number, caller in enumerate(("app", "other")):
        ledger.record_feedback(t.FeedbackRow(
            id=f"{number:064x}", caller=caller, release=1, route="classify", input="0" * 32, answered_at=t.utc_now(),
            verdict="wrong", detail={"comment": "my address"}, created_at=t.utc_now(),
        ))  # fmt: skip
    delete(ledger, source="feedback:app", domain="feedback")
    maintainer.run_once()
    assert len(ledger.feedback()) == 2, "only some of the caller's samples"
    delete(ledger, source="feedback:app")
    maintainer.run_once()
    assert [each.caller for each in ledger.feedback()] == ["other"]


def test_retention_looks_now_and_then_goes_on_at_once_and_rewrites_no_file_for_a_few_rows(
    maintainer: Maintainer, store: SampleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(maintainer, "retention", max_age_days=1, keep_samples=0)
    monkeypatch.setattr("streams.store.retention.IDS_AT_ONCE", 3)
    monkeypatch.setattr("streams.store.retention.MOST_AT_ONCE", 3)
    assert [maintainer.run_once().removed for _ in range(2)] == [3, 1]
    put(store, [sample(0, 9)], Position(TOPIC, 0, 10))
    assert maintainer.run_once().removed == 0
    monkeypatch.setattr(maintenance, "EXPIRE_SECONDS", 0.0)
    assert maintainer.run_once().removed == 1
    put(store, [sample(0, n, ingested_at=datetime.now(UTC)) for n in range(10, 14)], Position(TOPIC, 0, 14))
    StoreWriter(store.table).remove("offset = 10", "retention", "old")
    assert maintainer.run_once().written == 0
    StoreWriter(store.table).remove("offset IN (11, 12)", "retention", "old")
    assert maintainer.run_once().written > 0


def test_it_waits_for_a_ledger_whose_disk_is_full_and_ends_when_it_is_asked_to(
    settings: Settings, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping, attempts = threading.Event(), 0

    def full(url: str) -> Ledger:
        nonlocal attempts
        attempts += 1
        if attempts == 3:
            return ledger
        if attempts > 4:
            stopping.set()
        raise LedgerUnavailable(f"ledger {url} cannot be used: database or disk is full.")

    monkeypatch.setattr(Ledger, "open", full)
    assert wait_for_ledger(settings, stopping) is ledger
    assert wait_for_ledger(settings, stopping) is None and attempts == 5


def test_an_index_without_a_worker_or_with_a_problem_shows(
    maintainer: Maintainer, ledger: Ledger, settings: Settings
) -> None:
    def failing() -> dict[str, float]:
        maintainer.run_once()
        assert _indexes(settings).state == ("warn" if any(ledger.index_problems().values()) else "ok")
        series = (each for each in INDEX_FAILING.collect()[0].samples)
        return {each.labels["index"]: each.value for each in series}

    assert failing() == {}
    for name in ("found", "left"):
        ledger.add_index(IndexRow(name=name, url="x://y", source=name, id_field="id", image_field="url"), actor="me")
    ledger.pause_index("left", True, actor="me")
    assert failing() == {"found": 1} and _indexes(settings).found == "found: no worker runs"
    ledger.acquire_lease(INDEX_LEASE, "worker", 600)
    assert failing() == {"found": 0}
    ledger.set_index_problem("found", "the database is away")
    assert failing() == {"found": 1} and _indexes(settings).found == "found: the database is away"
    ledger.remove_index("found", actor="me")
    assert failing() == {}
