"""How kafka-python reports a log that was cut off (KIP-320): what ``tolerant_fetch`` says about it holds."""

from __future__ import annotations

import asyncio
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from kafka import KafkaConsumer, OffsetAndMetadata
from kafka.errors import LogTruncationError
from kafka.protocol.consumer import FetchResponse, OffsetForLeaderEpochResponse

from streams.kafka.tolerant_fetch import seek, truncations
from tests.support.record_log import PARTITION, LogReader

Topic = OffsetForLeaderEpochResponse.OffsetForLeaderTopicResult
Diverging = FetchResponse.FetchableTopicResponse.PartitionData.EpochEndOffset
POSITION = 50


def consumer_of(reader: LogReader) -> Any:
    """What ``seek`` needs of a consumer: the library's own method, and the subscriptions."""
    consumer: Any = SimpleNamespace(_subscription=reader.subscriptions)
    consumer.seek = partial(KafkaConsumer.seek, consumer)
    return consumer


def reader_of_epoch_3() -> LogReader:
    """Read up to offset 50 of epoch 3; the leader has epoch 4 by now."""
    reader = LogReader(epoch=4)
    seek(consumer_of(reader), PARTITION, POSITION, 3)
    reader.fetcher._manager.cluster.leader_for_partition = lambda partition: 0
    return reader


def validate(reader: LogReader, end_offset: int, end_epoch: int) -> None:
    """What ``poll`` does about positions, with a leader that answers ``OffsetForLeaderEpoch`` so."""
    result = Topic.EpochEndOffset(partition=0, error_code=0, leader_epoch=end_epoch, end_offset=end_offset)
    answer = OffsetForLeaderEpochResponse(topics=[Topic(topic=PARTITION.topic, partitions=[result])], version=3)

    async def send(request: Any, node_id: int) -> Any:
        return answer

    reader.fetcher._manager.send = send
    asyncio.run(reader.fetcher._validate_offsets_for_node(0, {PARTITION: reader.position}))


def test_a_newer_leader_has_the_position_checked_before_anything_is_fetched() -> None:
    reader = reader_of_epoch_3()
    reader.fetcher.maybe_validate_positions()
    assert not reader.subscriptions.is_fetchable(PARTITION)
    validate(reader, end_offset=POSITION, end_epoch=3)
    assert reader.subscriptions.is_fetchable(PARTITION) and reader.position.offset == POSITION


@pytest.mark.parametrize("end_offset, end_epoch, expected", [(42, 2, 42), (-1, -1, None)])
def test_a_truncation_is_raised_once_with_the_point_of_divergence(
    end_offset: int, end_epoch: int, expected: int | None
) -> None:
    reader = reader_of_epoch_3()
    reader.fetcher.maybe_validate_positions()
    validate(reader, end_offset, end_epoch)
    with pytest.raises(LogTruncationError) as raised:
        reader.fetcher.validate_offsets_if_needed()
    assert truncations(raised.value) == {0: expected}
    reader.fetcher.maybe_validate_positions()
    assert reader.fetcher.validate_offsets_if_needed() is None, "it was raised a second time"
    assert reader.subscriptions.is_fetchable(PARTITION) and reader.position.offset == POSITION, "the old position stays"


def test_a_fetch_that_diverges_has_the_position_checked_again() -> None:
    reader = reader_of_epoch_3()
    assert not reader.poll(b"", 60, diverging_epoch=Diverging(epoch=2, end_offset=42))
    assert reader.subscriptions.is_offset_validation_needed(PARTITION)


def test_only_a_seek_with_the_epoch_keeps_the_next_truncation_in_sight() -> None:
    reader = reader_of_epoch_3()
    consumer = consumer_of(reader)
    with pytest.raises(ValueError, match="int"):
        consumer.seek(PARTITION, OffsetAndMetadata(42, "", 2))
    seek(consumer, PARTITION, 42)
    reader.fetcher.maybe_validate_positions()
    assert reader.subscriptions.is_fetchable(PARTITION), "without an epoch there is nothing to check"
    seek(consumer, PARTITION, 42, 2)
    reader.fetcher.maybe_validate_positions()
    assert reader.position == (42, "", 2) and not reader.subscriptions.is_fetchable(PARTITION)
