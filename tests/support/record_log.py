"""An in-memory log that answers fetches as a broker does, and a real kafka-python fetcher that reads it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from kafka import OffsetAndMetadata, TopicPartition
from kafka.consumer.fetcher import CompletedFetch, Fetcher
from kafka.consumer.subscription_state import SubscriptionState
from kafka.protocol.consumer import FetchResponse

from streams.kafka.tolerant_fetch import MAX_BATCH_BYTES, install

PARTITION = TopicPartition("samples", 0)
PartitionData = FetchResponse.FetchableTopicResponse.PartitionData


class RecordLog:
    """A sequence of batches. Their offsets are those at which they were appended, whatever their bytes say now."""

    def __init__(self, start: int = 0) -> None:
        self.batches: list[bytearray] = []
        self.spans: list[range] = []
        self.start = start

    @property
    def end(self) -> int:
        return self.spans[-1].stop if self.spans else self.start

    def append(self, batch: bytearray, count: int) -> None:
        self.batches.append(batch)
        self.spans.append(range(self.end, self.end + count))

    def fetch(self, offset: int, most: int = 1 << 30) -> bytes:
        """The batches from the one with ``offset`` on; the first whole, the last may be truncated at ``most`` bytes."""
        found = [bytes(each) for each, span in zip(self.batches, self.spans, strict=True) if span.stop > offset]
        return b"".join(found)[: max(most, len(found[0]))] if found else b""


class LogReader:
    """Drives ``Fetcher.fetched_records``, with ``install``, as ``KafkaConsumer.poll`` does."""

    def __init__(self, position: int = 0, limit: int = MAX_BATCH_BYTES, epoch: int = -1, **config: Any) -> None:
        cluster = SimpleNamespace(
            leader_epoch_for_partition=lambda _: epoch, request_update=lambda: None, add_topic=lambda topic: None
        )
        manager = SimpleNamespace(_net=None, cluster=cluster)
        self.subscriptions = SubscriptionState("none")
        self.subscriptions.assign_from_user([PARTITION])
        self.fetcher = Fetcher(SimpleNamespace(_manager=manager), self.subscriptions, **config)
        consumer: Any = SimpleNamespace(
            _fetcher=self.fetcher, config={"key_deserializer": None, "value_deserializer": None}
        )
        install(consumer, limit)
        self.subscriptions.seek(PARTITION, position)
        self.fetches = 0

    @property
    def position(self) -> OffsetAndMetadata:
        return self.subscriptions.assignment[PARTITION].position

    def poll(self, data: bytes, end: int, most: int = 500, **fields: Any) -> list[Any]:
        """Records of one fetch that brought ``data``, ``most`` at a time."""
        response = PartitionData(partition_index=0, error_code=0, high_watermark=end, records=data, **fields)
        self.fetches += 1
        self.fetcher._completed_fetches.append(CompletedFetch(PARTITION, self.position.offset, 12, response, None))
        records: list[Any] = []
        while self.fetcher._completed_fetches or self.fetcher._next_partition_records:
            polled, _ = self.fetcher.fetched_records(most)
            records += polled.get(PARTITION, [])
        return records

    def read(self, log: RecordLog, most_bytes: int = 1 << 30, **fields: Any) -> list[Any]:
        """Everything up to the end of the log. Fails after a hundred fetches without progress."""
        records: list[Any] = []
        still = 0
        while self.position.offset < log.end:
            before = self.position.offset
            records += self.poll(log.fetch(before, most_bytes), log.end, **fields)
            still = still + 1 if self.position.offset == before else 0
            assert still < 100, f"no way past offset {before}"
        return records
