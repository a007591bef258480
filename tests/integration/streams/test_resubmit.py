"""A quarantined record is sent again unchanged, once, and the audit log names the person."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest

from core.errors import AlreadyResubmitted, BrokerError, RecordError, UnknownRecord
from core.ledger import Ledger
from core.settings import Settings
from streams.ingest import resubmit as module
from streams.ingest.consumer import Consumer
from streams.ingest.resubmit import HEADER, list_quarantine, quarantined, resubmit
from streams.records.codecs import glimpse
from streams.store.sample_store import SampleStore
from tests.support.broker import Broker
from tests.support.kafka import (
    Message,
    good,
    make_topics,
    picture,
    produce,
    read_topic,
    reading,
    records_seen,
    wait_for,
)

pytestmark = pytest.mark.integration


class Stream:
    """An ingest for all tests of this module, and a ledger."""

    def __init__(self, settings: Settings, ingest: Consumer, ledger: Ledger) -> None:
        self.settings = settings
        self.ingest = ingest
        self.ledger = ledger

    def send(self, *messages: Message) -> list[str]:
        seen = records_seen(self.ingest.status)
        places = produce(self.settings.kafka, messages)
        self.wait(seen + len(messages))
        return [f"{topic}:{partition}:{offset}" for topic, partition, offset in places]

    def again(self, place: str, force: bool = False) -> str:
        seen = records_seen(self.ingest.status)
        sent = resubmit(self.settings, self.ledger, place, actor="key:ci", reason="mended", force=force)
        self.wait(seen + 1)
        return f"{sent.topic}:{sent.partition}:{sent.offset}"

    def wait(self, seen: int) -> None:
        wait_for(lambda: records_seen(self.ingest.status) >= seen, "the records")

    def became(self, place: str) -> str:
        rows = SampleStore(self.settings.lake).records().to_pylist()
        return next(r["kind"] for r in rows if f"{r['topic']}:{r['partition']}:{r['offset']}" == place)

    def by_uri(self, name: str) -> Message:
        """A record whose image is in a file that may not exist yet."""
        uri = f"file://{self.settings.home}/images/{name}"
        return json.dumps({"text": f"picture {name}", "image_uri": uri}).encode(), []

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
        yield Stream(settings, ingest, Ledger.open(settings.ledger))


def test_a_record_gets_into_the_store_once_what_refused_it_is_mended(stream: Stream) -> None:
    [place] = stream.send(stream.by_uri("late.png"))
    assert stream.became(place) == "quarantine"
    stream.mend("late.png", seed=1)
    again = stream.again(place)
    assert stream.became(again) == "sample"
    [row] = [row for row in stream.ledger.audit_rows() if row.subject == f"record {place}"]
    assert (row.actor, row.action, row.detail) == ("key:ci", "resubmit", {"reason": "mended", "times": 1})
    [sent] = [r for r in read_topic(stream.settings.kafka, stream.settings.kafka.topic, 2) if r.headers]
    assert dict(sent.headers)[HEADER] == place.encode()


def test_the_second_time_needs_force_and_is_stored_as_a_duplicate(stream: Stream) -> None:
    [place] = stream.send(stream.by_uri("twice.png"))
    stream.mend("twice.png", seed=2)
    stream.again(place)
    with pytest.raises(AlreadyResubmitted, match=r"key:ci.*mended.*force"):
        stream.again(place)
    assert stream.became(stream.again(place, force=True)) == "duplicate"
    assert stream.ledger.resubmissions([place])[place].times == 2


def test_of_two_at_once_one_sends(stream: Stream) -> None:
    [place] = stream.send(stream.by_uri("race.png"))
    seen = records_seen(stream.ingest.status)
    outcomes: list[str] = []

    def send() -> None:
        try:
            resubmit(stream.settings, stream.ledger, place, actor="a", reason="r")
            outcomes.append("sent")
        except AlreadyResubmitted:
            outcomes.append("refused")

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stream.wait(seen + 1)
    assert sorted(outcomes) == ["refused", "refused", "refused", "sent"]


def test_what_is_refused_again_lies_in_quarantine_anew_with_its_history(stream: Stream) -> None:
    image, headers = good(3, time="yesterday")
    [place] = stream.send((image, headers))
    newest = list_quarantine(stream.settings, stream.ledger, limit=1)[0]
    assert (newest.place, newest.reason, newest.resubmission) == (place, "schema", None)
    again = stream.again(place)
    records = list_quarantine(stream.settings, stream.ledger, limit=2, reason="schema")
    assert [record.place for record in records] == [again, place]
    assert records[1].resubmission is not None
    assert records[1].resubmission.state == "sent"
    came = quarantined(stream.settings, again)
    assert came.value == image
    assert dict(came.headers) == {**dict(headers), HEADER: place.encode()}
    shown, texts = glimpse(came.value, came.headers)
    assert shown == image
    assert texts["text"] == "picture 3"


def test_a_record_that_the_broker_did_not_take_may_be_tried_again(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    [place] = stream.send(stream.by_uri("away.png"))
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.2)
    nobody = stream.settings.kafka.model_copy(update={"bootstrap": "127.0.0.1:1"})
    with pytest.raises(BrokerError):
        resubmit(
            stream.settings.model_copy(update={"kafka": nobody}), stream.ledger, place, actor="ann", reason="mended"
        )
    assert stream.ledger.resubmissions([place])[place].state == "failed"
    assert stream.ledger.audit_rows(1)[0].action == "resubmit failed"
    monkeypatch.undo()
    stream.again(place)
    assert stream.ledger.resubmissions([place])[place].state == "sent"


def test_what_is_not_there_or_empty_cannot_be_sent(stream: Stream) -> None:
    [empty] = stream.send((b"", []))
    with pytest.raises(RecordError, match="nothing to send"):
        stream.again(empty)
    topic = stream.settings.kafka.topic
    for place in ("", "x", f"{topic}:0", f"{topic}:0:999999", f"{topic}:-1:0", f"{topic}:0:{'9' * 30}", "' OR 1=1:0:0"):
        with pytest.raises(UnknownRecord):
            stream.again(place)
