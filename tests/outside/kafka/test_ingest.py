"""What ingest meets at a broker: offsets without a readable record, deleted offsets, its group, topics of others."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import confluent_kafka as ck
import pytest
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic
from kafka import KafkaProducer

from core.settings import Settings
from streams.ingest.consumer import Consumer
from streams.ingest.ingest_report import IngestStatus
from streams.store.sample_store import SampleStore
from tests.outside.kafka.lost_assignment import assigned
from tests.support.apache_kafka import ApacheKafka
from tests.support.broker import Broker
from tests.support.kafka import good, make_topics, produce, read_topic, reading, wait_for

pytestmark = pytest.mark.kafka


@pytest.fixture(scope="session")
def broker(apache_kafka: ApacheKafka) -> Broker:
    return Broker(apache_kafka.address, embedded=False)


@pytest.fixture
def settings(broker: Broker, tmp_path: Path) -> Settings:
    made = broker.settings(tmp_path, kafka={"partitions": 1})
    make_topics(made)
    return made


@pytest.fixture
def store(settings: Settings) -> SampleStore:
    return SampleStore(settings.lake)


def position(settings: Settings, store: SampleStore) -> int:
    return store.offsets()[f"{settings.kafka.topic}:0"]


@contextmanager
def read_until(settings: Settings, condition: Callable[[IngestStatus], bool], what: str) -> Iterator[Consumer]:
    with reading(settings) as ingest:
        wait_for(lambda: ingest.status.lag == 0 and condition(ingest.status), f"{what}, and a lag of 0")
        yield ingest


class Transactions:
    """A producer that sends good records in transactions."""

    def __init__(self, settings: Settings) -> None:
        self.topic = settings.kafka.topic
        self._producer = ck.Producer({"bootstrap.servers": settings.kafka.bootstrap, "transactional.id": self.topic})
        self._producer.init_transactions(30)
        self._seed = 0

    def send(self, count: int, commit: bool = True) -> None:
        self._producer.begin_transaction()
        for _ in range(count):
            value, headers = good(self._seed)
            self._producer.produce(self.topic, value=value, headers=headers)
            self._seed += 1
        self._producer.flush()
        end = self._producer.commit_transaction if commit else self._producer.abort_transaction
        end()


def admin_of(settings: Settings) -> AdminClient:
    return AdminClient({"bootstrap.servers": settings.kafka.bootstrap})


def delete_before(settings: Settings, offset: int) -> None:
    admin = admin_of(settings)  # kept until it has answered
    for done in admin.delete_records([ck.TopicPartition(settings.kafka.topic, 0, offset)]).values():
        assert done.result(20).low_watermark == offset


def test_markers_and_aborted_records_are_neither_lag_nor_lost(settings: Settings, store: SampleStore) -> None:
    sender = Transactions(settings)
    sender.send(10)
    with read_until(settings, lambda status: status.samples == 10, "10 samples"):
        sender.send(1000, commit=False)
        wait_for(lambda: position(settings, store) == 10 + 1 + 1000 + 1, "the position is behind the aborted tail")
        sender.send(5)
        wait_for(lambda: store.count() == 15, "5 more samples")
    end = 10 + 1 + 1000 + 1 + 5 + 1
    delete_before(settings, end)
    sender.send(3)
    with read_until(settings, lambda status: status.samples == 3, "3 samples") as ingest:
        assert ingest.status.gap_offsets == 0
    assert store.gaps() == [] and position(settings, store) == end + 3 + 1


def test_records_that_retention_deletes_unread_are_reported(settings: Settings, store: SampleStore) -> None:
    sender = Transactions(settings)
    sender.send(4)
    with read_until(settings, lambda status: status.samples == 4, "4 samples"):
        pass
    sender.send(7)
    delete_before(settings, 4 + 1 + 7)
    with read_until(settings, lambda status: status.gap_offsets > 0, "the loss"):
        pass
    assert [(gap["offset"], gap["until"], gap["reason"]) for gap in store.gaps()] == [(5, 12, "retention")]


def test_what_compaction_removes_is_neither_lag_nor_lost(broker: Broker, tmp_path: Path) -> None:
    settings = broker.settings(tmp_path, kafka={"partitions": 1})
    topic = settings.kafka.topic
    compacted = {"cleanup.policy": "compact", "segment.ms": "100", "min.cleanable.dirty.ratio": "0.01"}
    admin = admin_of(settings)
    admin.create_topics([NewTopic(topic, 1, 1, config=compacted)])[topic].result(20)
    producer = KafkaProducer(bootstrap_servers=settings.kafka.bootstrap)
    seeds = count()

    def send() -> int:
        value, headers = good(next(seeds))
        return int(producer.send(topic, value, key=b"one key", headers=headers).get(20).offset)

    for _ in range(20):
        send()
    while True:
        end = send() + 1  # in a new segment, so that those before it can be compacted
        if read_topic(settings.kafka, topic)[0].offset >= 20:
            break
    producer.close(5)
    with read_until(settings, lambda status: status.samples > 0, "what is left"):
        pass
    store = SampleStore(settings.lake)
    assert store.gaps() == [] and position(settings, store) == end


@pytest.mark.long
def test_an_unclean_election_loses_no_record(apache_kafka: ApacheKafka, settings: Settings, store: SampleStore) -> None:
    """One node: its log is truncated while it is down, like that of a replica that was behind and became the leader."""
    produce(settings.kafka, [good(n) for n in range(6)])
    log = apache_kafka.data / f"{settings.kafka.topic}-0" / f"{0:020}.log"
    short = log.stat().st_size
    produce(settings.kafka, [good(n) for n in range(6, 10)])
    with read_until(settings, lambda status: status.samples == 10, "10 samples"):
        pass
    apache_kafka.stop(signal.SIGKILL)
    with log.open("ab") as file:
        file.truncate(short)
    apache_kafka.start()
    produce(settings.kafka, [good(n) for n in range(100, 105)])
    with read_until(settings, lambda status: status.samples == 5, "5 samples of the new leader") as ingest:
        assert (ingest.status.rewritten_offsets, ingest.status.gap_offsets) == (4, 0)
    topic = settings.kafka.topic
    assert store.offsets() == {f"{topic}:0": 10, f"{topic}@1:0": 11}
    assert store.gaps() == [] and store.tally()["rewritten_offsets"] == 4 and store.count() == 15


def test_more_partitions_are_noticed_within_seconds_and_read_whole(settings: Settings, store: SampleStore) -> None:
    topic = settings.kafka.topic
    with read_until(settings, lambda status: status.state == "reading", "reading") as ingest:
        admin = admin_of(settings)
        admin.create_partitions([NewPartitions(topic, 4)])[topic].result(20)
        started = time.monotonic()
        for partition in range(4):
            produce(settings.kafka, [good(partition)], partition)
        wait_for(lambda: ingest.status.samples == 4, "a sample of each partition")
        assert time.monotonic() - started < 60, "metadata is 300 s old before kafka-python asks for it by itself"
    assert store.offsets() == {f"{topic}:{number}": 1 for number in range(4)}


AT_ONCE = 4
WITHIN_SECONDS = 25.0
"""Less than ingest itself waits before it joins again, so that a failed join shows."""


def seconds_to_join(broker: Broker, home: Path) -> float:
    settings = broker.settings(home)
    make_topics(settings)
    with reading(settings) as ingest:
        started = time.monotonic()
        while ingest.status.state != "reading" and time.monotonic() - started < WITHIN_SECONDS:
            time.sleep(0.05)
        return time.monotonic() - started


@pytest.mark.timeout(6000)
@pytest.mark.parametrize("starts", [8, pytest.param(200, marks=pytest.mark.long)])
def test_every_start_is_let_into_the_group(broker: Broker, tmp_path: Path, starts: int) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        took = list(pool.map(lambda number: seconds_to_join(broker, tmp_path / str(number)), range(starts)))
    stuck = sum(seconds >= WITHIN_SECONDS for seconds in took)
    print(f"{stuck} of {starts} starts not let in within {WITHIN_SECONDS:.0f} s; the slowest took {max(took):.1f} s")
    assert stuck == 0


def test_a_join_that_polls_leave_half_done_is_completed(broker: Broker, tmp_path: Path) -> None:
    """kafka-python alone fails nine of ten times; see ``kafka_python_report.md``."""
    settings = broker.settings(tmp_path)
    make_topics(settings)
    assert all(assigned(broker.address, settings.kafka.topic, poll_ms=1, fixed=True) for _ in range(10))


@pytest.mark.long
def test_a_topic_that_a_record_made_is_told(broker: Broker, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = broker.settings(tmp_path)
    topic = settings.kafka.topic
    producer = KafkaProducer(bootstrap_servers=broker.address)
    producer.send(topic, b"no picture").get(30)
    producer.close(5)
    with reading(settings) as ingest:
        wait_for(lambda: ingest.status.quarantined == 1, "the record")
    said = [each for each in caplog.messages if each.startswith(f"topic {topic} ")]
    assert len(said) == 2 and "at most 1,048,588 bytes" in said[0] and "1 partition(s)" in said[1]
    assert not [each for each in caplog.messages if each.startswith(f"topic {settings.kafka.quarantine_topic} takes")]
