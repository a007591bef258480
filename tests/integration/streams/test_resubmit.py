"""Quarantined records are sent again unchanged, once, one by one or in bulk, and the audit log names the person."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from core.errors import AlreadyResubmitted, BrokerError, ConfigError, LedgerError, RecordError, UnknownRecord
from core.ledger import Ledger
from core.ledger.rows import AUDITOR, FeedbackRow
from core.settings import Settings
from streams.ingest import resubmit as module
from streams.ingest.consumer import Consumer
from streams.ingest.resubmit import HEADER, QuarantineFilter, ResubmitReport, list_quarantine, resubmit, resubmit_many
from streams.kafka import clients
from streams.kafka.corrections import publish_corrections
from streams.records.codecs import glimpse
from streams.store.rows import Position
from streams.store.sample_queries import trace
from streams.store.sample_store import SampleStore
from tests.support.broker import Broker
from tests.support.kafka import Message, good, make_topics, picture, produce, read_topic, reading, taken

WHEN = datetime(2026, 1, 1, tzinfo=UTC)
REASONS = ["schema", "schema", "uri_unreachable", "uri_unreachable", "schema", "empty"]


class Stream:
    """An ingest for all tests of this module, and a ledger."""

    def __init__(self, settings: Settings, ingest: Consumer) -> None:
        self.settings, self.ingest, self.ledger = settings, ingest, Ledger.open(settings.ledger)

    def send(self, *messages: Message) -> list[str]:
        with taken(self.ingest, len(messages)):
            places = produce(self.settings.kafka, messages)
        return [f"{topic}:{partition}:{offset}" for topic, partition, offset in places]

    def again(self, place: str, force: bool = False) -> str:
        with taken(self.ingest, 1):
            sent = resubmit(self.settings, self.ledger, place, actor="key:ci", reason="mended", force=force)
        return f"{sent.topic}:{sent.partition}:{sent.offset}"

    def became(self, place: str) -> str:
        topic, partition, offset = place.split(":")
        return trace(SampleStore(self.settings.lake), (topic, int(partition), int(offset)))[0].outcome

    def quarantined(self, name: str) -> str:
        """The place of a record whose image is in a file that does not exist yet."""
        uri = f"file://{self.settings.home}/images/{name}"
        [place] = self.send((json.dumps({"text": f"picture {name}", "image_uri": uri}).encode(), []))
        return place

    def mend(self, name: str, seed: int) -> None:
        folder = self.settings.home / "images"
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(picture(seed))


@pytest.fixture(scope="module")
def stream(broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stream]:
    home = tmp_path_factory.mktemp("resubmit")
    settings = broker.settings(home, ingest={"allowed_uris": [f"file://{home}/images"]})
    make_topics(settings)
    with reading(settings) as ingest:
        yield Stream(settings, ingest)


def test_a_record_gets_into_the_store_once_what_refused_it_is_mended_and_again_by_force_only(stream: Stream) -> None:
    place = stream.quarantined("late.png")
    assert stream.became(place) == "refused"
    stream.mend("late.png", seed=1)
    assert stream.became(stream.again(place)) == "stored"
    [row] = [row for row in stream.ledger.audit_rows() if row.subject == f"record {place}"]
    assert (row.actor, row.action, row.detail) == ("key:ci", "resubmit", {"reason": "mended", "times": 1})
    [sent] = [r for r in read_topic(stream.settings.kafka, stream.settings.kafka.topic, 2) if r.headers]
    assert dict(sent.headers)[HEADER] == place.encode()
    with pytest.raises(AlreadyResubmitted, match=r"key:ci.*mended.*force"):
        stream.again(place)
    assert stream.became(stream.again(place, force=True)) == "duplicate"
    assert stream.ledger.resubmissions([place])[place].times == 2


def test_of_several_at_once_one_sends(stream: Stream) -> None:
    place = stream.quarantined("race.png")
    outcomes: list[str] = []

    def send() -> None:
        try:
            resubmit(stream.settings, stream.ledger, place, actor="a", reason="r")
            outcomes.append("sent")
        except AlreadyResubmitted:
            outcomes.append("refused")

    threads = [threading.Thread(target=send) for _ in range(4)]
    with taken(stream.ingest, 1):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(outcomes) == ["refused", "refused", "refused", "sent"]


def test_what_is_refused_again_lies_in_quarantine_anew_with_its_history(stream: Stream) -> None:
    image, headers = good(3, time="yesterday")
    [place] = stream.send((image, headers))
    newest = list_quarantine(stream.settings, stream.ledger, limit=1)[0]
    assert (newest.place, newest.reason, newest.resubmission) == (place, "schema", None)
    again = stream.again(place)
    records = list_quarantine(stream.settings, stream.ledger, limit=2, reason="schema")
    assert [record.place for record in records] == [again, place]
    assert records[1].resubmission is not None and records[1].resubmission.state == "sent"
    came = module.quarantined(stream.settings, again)
    assert came.value == image
    assert dict(came.headers) == {**dict(headers), HEADER: place.encode()}
    shown, texts = glimpse(came.value, came.headers)
    assert (shown, texts["text"]) == (image, "picture 3")


def test_what_is_not_there_or_empty_cannot_be_sent(stream: Stream) -> None:
    [empty] = stream.send((b"", []))
    with pytest.raises(RecordError, match="nothing to send"):
        stream.again(empty)
    topic = stream.settings.kafka.topic
    for place in ("", "x", f"{topic}:0", f"{topic}:0:999999", f"{topic}:-1:0", f"{topic}:0:{'9' * 30}", "' OR 1=1:0:0"):
        with pytest.raises(UnknownRecord):
            stream.again(place)


def refused(offset: int, reason: str) -> dict[str, Any]:
    return {
        "kind": "quarantine", "topic": "t", "partition": 0, "offset": offset, "reason": reason, "detail": "",
        "source": f"cam {offset % 2}", "ingested_at": WHEN + timedelta(hours=offset), "original_key": b"k",
        "original": None if reason == "empty" else b"value %d" % offset,
        "original_headers": json.dumps([["x", "eQ=="], [HEADER, "dDow"]]),
    }  # fmt: skip


def filled(settings: Settings) -> Settings:
    rows = [refused(offset, reason) for offset, reason in enumerate(REASONS)]
    SampleStore(settings.lake).put(rows, [Position("t", 0, len(rows))])
    return settings


@pytest.fixture
def settings(broker: Broker, tmp_path: Path) -> Settings:
    found = broker.settings(tmp_path)
    make_topics(found)
    return filled(found)


def again(settings: Settings, ledger: Ledger, which: QuarantineFilter, **options: Any) -> ResubmitReport:
    return resubmit_many(settings, ledger, which, actor="ann", reason="corrected", per_second=10_000, **options)


def test_in_bulk_each_is_sent_once_as_it_came_with_its_position_also_by_two_calls_at_once(
    settings: Settings, ledger: Ledger
) -> None:
    nested: list[ResubmitReport] = []

    def other(report: ResubmitReport) -> None:
        if not nested:
            nested.append(again(settings, ledger, QuarantineFilter("schema")))

    one = again(settings, ledger, QuarantineFilter("schema"), on_progress=other)
    reports = [*nested, one, again(settings, ledger, QuarantineFilter("schema"))]
    assert [(report.chosen, report.sent, report.before) for report in reports] == [(2, 2, 1), (1, 1, 2), (0, 0, 3)]
    assert {report.exit_status for report in reports} == {0}
    records = read_topic(settings.kafka, settings.kafka.topic, 3)
    assert sorted(each.value for each in records) == [b"value 0", b"value 1", b"value 4"]
    assert {each.key for each in records} == {b"k"}
    assert sorted(dict(each.headers)[HEADER] for each in records) == [b"t:0:0", b"t:0:1", b"t:0:4"]
    assert [(row.actor, row.action) for row in ledger.audit_rows()] == [("ann", "resubmit")] * 3


def test_a_broker_that_is_gone_ends_it_what_failed_may_be_tried_again_and_the_oldest_are_chosen_first(
    settings: Settings, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing:
        def __init__(self, *_: object) -> None: ...

        def send(self, *_: object) -> Any:
            raise BrokerError("the broker refuses it.")

        def close(self) -> None: ...

    with monkeypatch.context() as patch:
        patch.setattr(clients, "RecordSender", Refusing)
        with pytest.raises(BrokerError, match="ended early: 0 of 5 records were sent again; 3 failed"):
            again(settings, ledger, QuarantineFilter(limit=5))
    assert ledger.resubmissions(["t:0:0"])["t:0:0"].state == "failed"
    assert ledger.audit_rows(1)[0].action == "resubmit failed"
    for sent in (2, 2, 1):
        report = again(settings, ledger, QuarantineFilter(limit=2))
        assert report.sent == sent
    assert ledger.resubmissions(["t:0:0"])["t:0:0"].state == "sent"
    assert (report.empty, report.exit_status) == (1, 3)  # a record without a value cannot be sent
    assert len(read_topic(settings.kafka, settings.kafka.topic, 5)) == 5


def test_a_dry_run_counts_by_filter_and_sends_nothing(tmp_path: Path) -> None:
    settings = filled(Settings(home=tmp_path, kafka={"bootstrap": "127.0.0.1:1"}))
    wanted = [
        (QuarantineFilter(), 6), (QuarantineFilter("uri_unreachable"), 2), (QuarantineFilter(source="cam 1"), 3),
        (QuarantineFilter("schema", "cam 0"), 2), (QuarantineFilter(since=WHEN + timedelta(hours=4)), 2),
        (QuarantineFilter(source=""), 0), (QuarantineFilter(limit=4), 4),
    ]  # fmt: skip
    with closing(Ledger.open(settings.ledger)) as ledger:
        for which, count in wanted:
            report = again(settings, ledger, which, dry_run=True)
            assert (report.chosen, report.sent, str(count) in str(report)) == (count, 0, True), which
        assert ledger.audit_rows() == []
    for wrong in ({"reason": "nonsense"}, {"limit": 0}, {"limit": 10**9}):
        with pytest.raises(ConfigError):
            QuarantineFilter(**wrong)


def test_an_accepted_correction_is_a_sample_once_even_if_its_process_died_before_it_noted_that(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = stream.ledger

    def secret() -> bytes:
        return SampleStore(stream.settings.lake).table.identity()[1]

    said = {
        1: {"label": "bus"},
        2: {"text": "a red bus", "label": "bus"},
        3: {"label": "no image"},
        4: {"label": "car"},
    }
    for number, detail in said.items():
        ledger.record_feedback(FeedbackRow(
            id=f"{number}" * 64, caller=AUDITOR if number == 2 else "app", release=1, route="classify", input="",
            answered_at=WHEN, state="waiting", verdict="correct", detail=detail,
            image=b"none" if number == 3 else picture(100 + number),
        ))  # fmt: skip
    assert publish_corrections(stream.settings, ledger, secret) == 0
    for number in (1, 2, 3):
        assert ledger.review_correction(f"{number}" * 8, True, actor="ann", reason="seen").state == "accepted"
    with monkeypatch.context() as dying, taken(stream.ingest, 1), pytest.raises(KeyboardInterrupt):
        dying.setattr(ledger, "settle_correction", Mock(side_effect=KeyboardInterrupt))
        publish_corrections(stream.settings, ledger, secret)
    with taken(stream.ingest, 2):
        assert publish_corrections(stream.settings, ledger, secret) == 3
    assert publish_corrections(stream.settings, ledger, secret) == 0

    outcomes = {row.detail.get("text", row.detail["label"]): row.outcome for row in ledger.corrections("published")}
    assert {text: stream.became(str(place)) for text, place in outcomes.items()} == {
        "bus": "duplicate", "a red bus": "stored",
    }  # fmt: skip
    (refused,) = ledger.corrections("dismissed")
    assert refused.detail == {"label": "no image"} and refused.outcome
    columns = ["source", "domain", "label"]
    for row in SampleStore(stream.settings.lake).newest(9, "source = 'feedback:app'", columns):
        assert [row[column] for column in columns] == ["feedback:app", "feedback", "bus"]
    audited = SampleStore(stream.settings.lake).newest(9, "source = 'audit'", columns)
    assert [[row[column] for column in columns] for row in audited] == [["audit", "feedback", "bus"]]
    dismissed = ledger.review_correction("44444444", False, actor="ann", reason="not a car")
    assert (dismissed.state, dismissed.outcome) == ("dismissed", "not a car")
    assert not any(row.image for state in ("published", "dismissed") for row in ledger.corrections(state, images=True))
    for prefix, problem in (("44444444", "no correction waits"), ("4444", "no correction waits")):
        with pytest.raises(LedgerError, match=problem):
            ledger.review_correction(prefix, True, actor="ann", reason="again")
    assert [row.action for row in ledger.audit_rows(2, actor="ann")] == ["dismiss correction", "accept correction"]
