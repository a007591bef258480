"""What can happen to a log beside being appended to: it is lost, cut off, or deleted before it was read."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final

from kafka import TopicPartition
from kafka.errors import IllegalStateError

from core import metrics
from core.errors import BrokerError
from streams.assignment import Reading
from streams.clients import Admin
from streams.quality.validate import StoreRow


class LogLost(BrokerError):
    """The topic is not the one that has been read so far."""


class LogWatch:
    """Looks at the topic that a consumer reads. Use from the consumer's thread."""

    #: How often it is looked at while no records come, which is also how soon a lost broker is noticed.
    SECONDS: Final = 2.0

    def __init__(self, admin: Admin, consumer: Any, topic: str, topic_id: str) -> None:
        self._admin = admin
        self._consumer = consumer
        self._topic = topic
        self.topic_id = topic_id
        self._looked_at = time.monotonic()
        self._measured: set[int] = set()

    @property
    def due(self) -> bool:
        """Whether it is time to look."""
        return time.monotonic() - self._looked_at > self.SECONDS

    def look(self) -> None:
        """Make sure that what was just polled is from the log that has been read so far.

        Asked after each poll (0.5 ms): a log cannot come back, so if the topic still has its id now, it had it then.
        If the topic has more partitions than the consumer knows, the consumer asks for them now, so that the group
        shares them out; by itself it would after up to five minutes.

        Raises:
            LogLost, BrokerError
        """
        topic = self._admin.topic(self._topic)
        self._looked_at = time.monotonic()
        if topic is None or topic.id != self.topic_id:
            now = topic.id if topic else "gone"
            raise LogLost(
                f"topic {self._topic} has lost its log (its id was {self.topic_id}, is {now}).",
                "The new one is read from its beginning.",
            )
        cluster = self._consumer._client.cluster
        if topic.partitions > len(cluster.partitions_for_topic(self._topic) or ()):
            cluster.request_update()

    def range(self, partition: int) -> tuple[int, int]:
        """First and end offset of a partition's log."""
        key = TopicPartition(self._topic, partition)
        return self._consumer.beginning_offsets([key])[key], self._consumer.end_offsets([key])[key]

    def lag(self, readings: Iterable[Reading]) -> int | None:
        """How far the store is behind, by what the broker said with the last fetch of each partition.

        None while that is not known of any. The metric of a partition that is not read here any more goes.
        """
        lags = {}
        for reading in readings:
            try:
                end = self._consumer.highwater(TopicPartition(self._topic, reading.partition))
            except IllegalStateError:  # just revoked
                continue
            if end is not None:
                lags[reading.partition] = max(0, end - reading.stored)
        for partition, records in lags.items():
            metrics.ingest.lag(partition, records)
        self.forget_lag(self._measured - lags.keys())
        self._measured = set(lags)
        return sum(lags.values()) if lags else None

    def forget_lag(self, partitions: Iterable[int] | None = None) -> None:
        """Take partitions (all by default) out of the metrics."""
        for partition in list(self._measured if partitions is None else partitions):
            metrics.ingest.no_lag(partition)
            self._measured.discard(partition)


def gap(reading: Reading, start: int, until: int) -> StoreRow:
    """The row that says that the broker deleted the offsets from ``start`` to before ``until`` unread."""
    return {
        "kind": "gap",
        "topic": reading.stream,
        "partition": reading.partition,
        "offset": start,
        "until": until,
        "reason": "retention",
        "detail": f"{until - start} offsets: the broker deleted them before they were read",
        "ingested_at": datetime.now(UTC),
    }
