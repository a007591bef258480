from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.ledger import Ledger
from streams.ingest.perceptual_hash import SplitRule
from streams.ingest.validate import Accepted
from streams.store import deletion, maintenance
from streams.store.sample_queries import trace
from tests.support.kafka import picture
from tests.support.worker import Worker

START = 1_767_225_600_000


class Sender(Worker):
    """A worker whose records are pictures with keys, a second apart."""

    def __init__(self, root: Path, partition: int = 0) -> None:
        super().__init__(root, partition, distance=-1, split=SplitRule(b"key", 0.5))

    def read(self, seed: int, key: str | None = "k", at: int | None = None, **fields: str) -> dict[str, Any]:
        headers = [(f"ratchet_{name}", value.encode()) for name, value in {"text": "a", **fields}.items()]
        time = START + 1000 * (self.reading.next if at is None else at)
        result = self.judged(picture(seed), headers, key.encode() if key else None, time)
        assert isinstance(result, Accepted), result
        self.add(result)
        return result.row

    def delete(self, ledger: Ledger, key: str) -> None:
        self.add(self.judged(None, key=key.encode()))
        self.commit()
        deletion.take_tombstones(self.store, ledger)
        deletion.remove(self.store, ledger, ledger.deletions(states=["requested"]))

    def deleted(self) -> list[str]:
        """IDs that an index must forget."""
        return [row["id"] for row in self.store.select("kind = 'deleted' AND id IS NOT NULL", ["id"])]

    def samples(self, *names: str) -> list[tuple[Any, ...]]:
        rows = self.store.scan(columns=["offset", *names]).to_pylist()
        return [tuple(row.values()) for row in rows]


@pytest.fixture
def worker(tmp_path: Path) -> Sender:
    return Sender(tmp_path)


@pytest.fixture(params=[True, False], ids=["in one batch", "in two"])
def between(request: pytest.FixtureRequest, worker: Sender) -> Iterator[Any]:
    return lambda: None if request.param else worker.commit()


def test_each_correction_replaces_the_one_before_it_alone(worker: Sender, between: Any) -> None:
    for seed in (1, 2, 3):
        worker.read(seed, replaces="key")
        between()
    worker.commit()
    assert sorted(worker.store.select("kind = 'deleted'", ["offset", "detail"]), key=lambda row: row["offset"]) == [
        {"offset": 0, "detail": "by t:0:1"}, {"offset": 1, "detail": "by t:0:2"},
    ]  # fmt: skip


def test_a_record_with_a_corrected_label_takes_the_place_of_the_one_before(worker: Sender, between: Any) -> None:
    worker.read(1, label="tram", domain="x")
    between()
    worker.read(1, label="bus", domain="streets")
    worker.read(2)
    outcome = worker.commit()
    assert (outcome.corrected, outcome.duplicates) == (1, {})
    assert worker.samples("label", "domain") == [(1, "bus", "streets"), (2, "", "")]
    tally = worker.store.tally()
    assert (tally["sample"], tally["deleted"], tally["bytes"]) == (2, 1, len(picture(1)) + len(picture(2)))
    assert worker.deleted() == [], "its id is stored as before"
    worker.read(1, label="bus", domain="streets")
    assert worker.commit().duplicates == {"exact": 1}, "the correction again is a duplicate"


@pytest.mark.parametrize("by", ["key", "id"])
def test_a_corrected_text_replaces_what_its_header_names(worker: Sender, between: Any, by: str) -> None:
    tram = worker.read(1, text="a tram")["id"]
    worker.read(2, key="other")
    between()
    worker.read(1, text="a bus", replaces="key" if by == "key" else tram)
    assert worker.commit().corrected == 1
    assert worker.samples("text") == [(1, "a"), (2, "a bus")]
    assert worker.deleted() == [tram]
    [first] = trace(worker.store, ("t", 0, 0))
    assert (first.outcome, first.reason, first.detail) == ("deleted", "corrected", "by t:0:2")
    assert worker.store.scan(columns=["extra"])["extra"].to_pylist() == ["", ""]


def test_a_corrected_sample_stays_on_its_side(worker: Sender) -> None:
    for seed in range(12):
        worker.read(seed, key=f"k{seed}")
    worker.commit()
    before = dict(worker.samples("split"))
    for seed in range(12):
        worker.read(seed, key=f"k{seed}", text="other words", replaces="key")
    worker.commit()
    assert {offset - 12: split for offset, split in worker.samples("split")} == before
    assert set(before.values()) == {"train", "fresh_eval"}


@pytest.mark.parametrize("fields", [{"label": "bus"}, {"text": "a bus", "replaces": "key"}], ids=["label", "text"])
def test_what_was_sent_before_the_correction_does_not_come_back(
    worker: Sender, tmp_path: Path, fields: dict[str, str]
) -> None:
    worker.read(1)
    worker.read(1, **fields)
    worker.commit()
    kept = worker.samples("text", "label")
    worker.read(1, at=0)  # a log that is read again from its beginning
    worker.read(1, at=1, **fields)
    outcome = worker.commit()
    assert (outcome.corrected, outcome.samples.total(), outcome.duplicates.total()) == (0, 0, 2)
    worker.follow_anew(tmp_path / "again.db")
    worker.read(1, at=0)
    assert worker.commit().samples.total() == 0, "an index that is made again knows of it"
    assert worker.samples("text", "label") == kept
    worker.read(1, at=99)
    assert worker.commit().samples.total() == 1, "what is sent later is meant so"


def test_the_newest_of_two_corrections_wins_in_whatever_order_they_come(worker: Sender) -> None:
    worker.read(1, at=0, label="a")
    worker.commit()
    worker.read(1, at=9, label="newest")
    worker.read(1, at=5, label="older")
    outcome = worker.commit()
    assert (outcome.corrected, outcome.duplicates) == (1, {"older": 1})
    assert worker.samples("label") == [(1, "newest")]


def test_a_worker_with_another_index_sees_a_correction_and_keeps_it(tmp_path: Path) -> None:
    first, second = Sender(tmp_path, 0), Sender(tmp_path, 1)
    first.read(1, label="tram")
    first.commit()
    second.read(1, label="tram", at=0)
    assert second.commit().duplicates == {"exact": 1}
    first.read(1, label="bus")
    first.read(2)
    first.commit()
    maintenance.compact(first.store, expunge=True)
    second.read(1, label="tram", at=0)
    second.read(2, at=0)
    assert second.commit().samples.total() == 0
    assert first.samples("label") == [(1, "bus"), (2, "")], "it is no double of what it replaced"
    assert second.index.settled() == []


@pytest.mark.parametrize("stored", [False, True], ids=["before the commit", "after the commit"])
def test_a_correction_that_a_crash_interrupts_is_made_once(
    worker: Sender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: bool
) -> None:
    worker.read(1, label="tram")
    worker.commit()
    worker.read(1, label="bus")
    commit = worker.writer._commit

    def die(*given: Any) -> int:
        if stored:
            commit(*given)
        raise LookupError

    monkeypatch.setattr(worker.writer, "_commit", die)
    with pytest.raises(LookupError):
        worker.commit()
    assert worker.samples("label") == ([(1, "bus")] if stored else [(0, "tram")])
    again = Sender(tmp_path)
    assert again.reading.next == (2 if stored else 1)
    again.read(1, label="bus")
    outcome = again.commit()
    assert (outcome.duplicates, outcome.corrected) == (({"exact": 1}, 0) if stored else ({}, 1))
    assert again.samples("label") == [(1, "bus")]


@pytest.mark.parametrize("order", [("first", "second", "third"), ("third", "second", "first")])
def test_a_sample_stays_until_all_who_sent_it_have_deleted_it(
    worker: Sender, ledger: Ledger, order: tuple[str, ...]
) -> None:
    for key in ("first", "second", "third"):
        worker.read(1, key=key, label=f"of {key}", source=key)
    worker.read(2, key="other")
    worker.commit()
    before = dict(worker.samples("split"))
    left = ["first", "second", "third"]
    for key in order:
        worker.delete(ledger, key)
        left.remove(key)
        samples = [row for row in worker.samples("label", "source", "split", "image") if row[1] != ""]
        offset = ["first", "second", "third"].index(left[0]) if left else None
        assert samples == ([(offset, f"of {left[0]}", left[0], before[0], picture(1))] if left else [])
        assert worker.store.tally()["sample"] == 1 + bool(left)
        assert len(worker.deleted()) == (not left), "nobody is to forget what stays"
        worker.read(1, key="later", label="of later")
        assert worker.commit().samples.total() == (not left), "it is known for as long as it is there"
        worker.delete(ledger, "later")
    assert sorted(row.samples for row in ledger.deletions()) == [0, 0, 0, 0, 1, 1]


def test_a_deletion_by_id_or_of_all_senders_leaves_nothing(worker: Sender, ledger: Ledger) -> None:
    first, _ = (worker.read(1, key=key, source="crawler") for key in ("first", "second"))
    worker.read(2, key="first", source="crawler")
    worker.commit()
    for selector in ({"id": first["id"]}, {"source": "crawler"}):
        asked = deletion.request_deletion(ledger, selector, actor="ann", reason="asked to")
        deletion.remove(worker.store, ledger, [asked])
    assert (worker.samples(), worker.store.count_rows("kind IN ('sample', 'duplicate')")) == ([], 0)


def test_what_another_sent_too_stays_when_it_is_corrected(worker: Sender, between: Any, tmp_path: Path) -> None:
    worker.read(1, label="of k")
    worker.read(1, key="other", label="of other")
    between()
    worker.read(1, text="other words", replaces="key")
    worker.commit()
    assert worker.samples("text", "label") == [(1, "a", "of other"), (2, "other words", "")]
    worker.read(1, key="other", label="of other")
    assert worker.commit().samples.total() == 0
    worker.follow_anew(tmp_path / "again.db")
    worker.read(1, key="other", label="of other")
    assert worker.commit().samples.total() == 0


def test_who_sent_a_sample_second_and_corrects_it_holds_on_to_it_no_more(
    worker: Sender, ledger: Ledger, between: Any
) -> None:
    worker.read(1, label="of k")
    worker.read(1, key="other")
    between()
    worker.read(1, key="other", text="other words", replaces="key")
    outcome = worker.commit()
    assert (outcome.corrected, worker.samples("text")) == (1, [(0, "a"), (2, "other words")])
    worker.read(1, key="third")
    assert worker.commit().duplicates == {"exact": 1}, "the first one's sample is there"
    worker.delete(ledger, "third")
    worker.delete(ledger, "k")
    assert worker.samples("text") == [(2, "other words")]
