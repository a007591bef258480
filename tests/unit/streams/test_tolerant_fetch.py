from __future__ import annotations

import asyncio
import inspect
import random
import struct
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from kafka import KafkaConsumer, OffsetAndMetadata
from kafka.consumer.fetcher import Fetcher
from kafka.errors import LogTruncationError
from kafka.protocol.consumer import FetchResponse, OffsetForLeaderEpochResponse
from kafka.record import MemoryRecordsBuilder

from core.errors import ConfigError
from streams.kafka.record_batches import MAX_HEADERS, MAX_RAW_BYTES, Corrupt
from streams.kafka.tolerant_fetch import MAX_FETCHES, check_library, install, seek, truncations
from tests.support.raw_batches import CODECS, RawBatch, RawMessage, encode_record, seal
from tests.support.record_log import PARTITION, LogReader, RecordLog

FIRST = 100
COUNT = 5
LENGTH, EPOCH, MAGIC, CRC, DELTA, RECORDS = 8, 12, 16, 17, 23, 57
AbortedTransaction = FetchResponse.FetchableTopicResponse.PartitionData.AbortedTransaction


def built(codec: int, base: int, count: int = COUNT) -> bytearray:
    builder = MemoryRecordsBuilder(2, codec, 1 << 24)
    for number in range(count):
        headers = [("ratchet_text", b"words " * 3), ("none", None)]
        builder.append(1_700_000_000_000 + number, b"key", b"%d of %d " % (number, base) * 6, headers)
    builder.close()
    batch = bytearray(builder.buffer())
    struct.pack_into(">q", batch, 0, base)
    return batch


def log_of(*codecs: int) -> RecordLog:
    log = RecordLog(FIRST)
    for codec in codecs:
        log.append(built(codec, log.end), COUNT)
    return log


def raw_log(*batches: tuple[bytearray, int]) -> RecordLog:
    """A log of batches, given with their numbers of offsets, whose base offsets are set."""
    log = RecordLog(FIRST)
    for batch, count in batches:
        struct.pack_into(">q", batch, 0, log.end)
        log.append(batch, count)
    return log


def read(log: RecordLog, **options: Any) -> list[Any]:
    return LogReader(log.start, **options).read(log)


def corrupt_offsets(records: list[Any]) -> list[int]:
    return [each.offset for each in records if isinstance(each, Corrupt)]


def offsets(records: list[Any]) -> list[int]:
    return [each.offset for each in records]


@pytest.mark.parametrize("codec", range(5), ids=CODECS)
def test_a_sound_log_reads_as_kafka_python_reads_it(codec: int) -> None:
    log = log_of(codec, 0, codec)
    tolerant, library = LogReader(FIRST), LogReader(FIRST)
    del library.fetcher.PartitionRecords, library.fetcher._parse_fetched_data  # the class's own again
    assert tolerant.read(log) == library.read(log) and tolerant.position == library.position


@pytest.mark.parametrize("codec", range(5), ids=CODECS)
@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_a_changed_byte_anywhere_costs_the_offsets_of_its_batch_at_most(codec: int, damaged: int) -> None:
    chance = random.Random(damaged * 10 + codec)
    sound = log_of(codec, codec, codec)
    intact = {each.offset: each for each in read(sound)}
    for at in range(len(sound.batches[damaged])):
        log = log_of(codec, codec, codec)
        log.batches[damaged][at] ^= chance.randrange(1, 256)
        records = read(log)
        unprotected = at < 8  # the base offset; a small change that fits its surroundings cannot be seen
        if not unprotected:
            assert offsets(records) == list(range(FIRST, log.end)), f"byte {at}"
        assert offsets(records) == sorted(set(offsets(records))), f"byte {at}"
        changed = {each.offset for each in records if each != intact.get(each.offset)}
        assert changed <= set(log.spans[damaged]) or unprotected, f"byte {at}"
        if at >= MAGIC:
            assert corrupt_offsets(records) == list(log.spans[damaged]), f"byte {at}"


@pytest.mark.parametrize("codec", range(5), ids=CODECS)
def test_broken_contents_under_a_right_checksum_cost_the_rest_of_the_batch_at_most(codec: int) -> None:
    chance = random.Random(codec)
    size = len(built(codec, FIRST))
    for _ in range(300):
        log = log_of(0, codec, 0)
        for _ in range(chance.choice((1, 1, 2, 8))):
            log.batches[1][chance.randrange(RECORDS, size)] = chance.randrange(256)
        seal(log.batches[1])
        records = read(log)
        found = offsets(records)
        assert found == sorted(set(found))
        # A smaller count reads as a batch that was compacted, whose other offsets are gone.
        counted = struct.unpack_from(">i", log.batches[1], RECORDS)[0] == COUNT
        assert found == list(range(FIRST, log.end)) if counted else set(log.spans[0]) | set(log.spans[2]) <= set(found)
        assert set(corrupt_offsets(records)) <= set(log.spans[1])


@pytest.mark.parametrize("codec", range(5), ids=CODECS)
def test_headers_that_are_not_utf_8_or_millions_cost_one_record(codec: int) -> None:
    messages = [RawMessage(b"value %d" % n, headers=[(b"name", b"x")]) for n in range(4)]
    messages[1] = RawMessage(b"value 1", headers=[(b"\xff\xfe", b"x"), (b"after", None)], timestamp=1_700_000_000_007)
    messages[2] = RawMessage(b"value 2", headers=[(b"", b"")] * (MAX_HEADERS + 1))
    records = read(raw_log((RawBatch(messages, codec).encode(), 4), (RawBatch(messages[:1], codec).encode(), 1)))
    assert [getattr(each, "value", None) for each in records] == [b"value 0", None, None, b"value 3", b"value 0"]
    _, wrong, many, *_ = records
    assert (wrong.offset, many.offset) == (FIRST + 1, FIRST + 2)
    assert wrong.timestamp == 1_700_000_000_007 and "header" in wrong.detail
    assert wrong.raw == encode_record(messages[1], 1, 7) and f"more than {MAX_HEADERS}" in many.detail


def test_a_broken_record_in_the_middle_leaves_those_before_it() -> None:
    batch = RawBatch([RawMessage(b"value %d" % n) for n in range(5)])
    body = bytearray(batch.body())
    third = len(encode_record(batch.messages[0], 0, 0)) * 2
    body[third + 4] = 0x7E  # its key is longer than the record
    records = read(raw_log((batch.encode(bytes(body)), 5), (RawBatch([RawMessage(b"next")]).encode(), 1)))
    assert [each.value for each in records if not isinstance(each, Corrupt)] == [b"value 0", b"value 1", b"next"]
    assert corrupt_offsets(records) == [FIRST + 2, FIRST + 3, FIRST + 4]
    assert records[2].raw is not None and records[3].raw is None, "the bytes of a batch come with its first offset only"


@pytest.mark.parametrize("codec", [1, 2, 3, 4], ids=CODECS[1:])
def test_a_batch_that_expands_beyond_the_bound_is_corrupt_and_the_next_is_read(codec: int) -> None:
    limit = 1 << 20
    bomb = RawBatch([RawMessage(b"\x00" * limit), RawMessage(b"small")], codec).encode()
    fits = RawBatch([RawMessage(b"\x00" * (limit - 100))], codec).encode()
    assert len(bomb) < limit / 10
    records = read(raw_log((bomb, 2), (fits, 1)), limit=limit)
    assert corrupt_offsets(records) == [FIRST, FIRST + 1] and len(records) == 3
    assert f"expands to more than {limit} bytes" in records[0].detail


def test_a_batch_with_a_wrong_checksum_is_not_expanded_and_its_bytes_are_kept_within_a_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("streams.kafka.record_batches.decompress", lambda *_: pytest.fail("expanded"))
    log = log_of(1, 0)
    log.batches[0][CRC] ^= 1
    reader = LogReader(FIRST + 3)
    records = reader.read(log)
    assert corrupt_offsets(records) == [FIRST + 3, FIRST + 4], "the read begins in the middle of it"
    assert offsets(records) == list(range(FIRST + 3, log.end))
    log = raw_log((RawBatch([RawMessage(b"x" * (2 * MAX_RAW_BYTES))]).encode(), 1))
    log.batches[0][-1] ^= 1
    [corrupt] = read(log)
    assert len(corrupt.raw) == MAX_RAW_BYTES


def test_damage_is_fetched_again_and_what_does_not_come_again_was_on_the_way() -> None:
    log = log_of(0, 0)
    reader = LogReader(FIRST)
    damaged = bytearray(log.fetch(FIRST))
    damaged[-1] ^= 1
    assert offsets(reader.poll(bytes(damaged), log.end)) == list(log.spans[0])
    assert not corrupt_offsets(reader.read(log)) and reader.position.offset == log.end
    reader = LogReader(FIRST)
    found: list[Any] = []
    while not found and reader.fetches < 10:
        damaged = bytearray(log.fetch(FIRST))
        damaged[100 + reader.fetches] ^= 1
        found = reader.poll(bytes(damaged), log.end)
    assert corrupt_offsets(found) == list(log.spans[0]) and reader.fetches == MAX_FETCHES, "it differs each time"
    log = log_of(0, 1, 2, 3, 4, 0)
    for number in (0, 1, 3, 5):
        log.batches[number][-1] ^= 1
    reader = LogReader(FIRST)
    records = reader.read(log)
    assert offsets(records) == list(range(FIRST, log.end)) and len(corrupt_offsets(records)) == 4 * COUNT
    assert reader.fetches == 2, "one more fetch is enough for all damage that it shows"


def test_a_claim_of_two_billion_records_makes_no_more_rows_than_the_bytes_can_hold() -> None:
    messages = [RawMessage(b"value")]
    for sealed in (True, False):
        batch = RawBatch(messages, extra={"delta": 2**31 - 2, "count": 2**31 - 1}).encode()
        batch[CRC] ^= not sealed
        log = RecordLog(FIRST)
        struct.pack_into(">q", batch, 0, FIRST)
        log.append(batch, 2**31 - 1)
        reader = LogReader(FIRST)
        records: list[Any] = []
        while not records:
            records = reader.poll(log.fetch(FIRST), log.end)
        assert 1 <= len(records) <= 1 + len(batch) // 7 and reader.position.offset > FIRST


def marker(producer: int, abort: bool) -> bytearray:
    return RawBatch(
        [RawMessage(b"", struct.pack(">hh", 0, int(not abort)))], attributes=0x30, producer=producer
    ).encode()


def test_aborted_transactions_markers_and_compacted_offsets_are_skipped_as_kafka_python_does() -> None:
    aborted = RawBatch([RawMessage(b"gone")] * 2, attributes=0x10, producer=7).encode()
    kept = RawBatch([RawMessage(b"kept")], attributes=0x10, producer=8).encode()
    later = RawBatch([RawMessage(b"later")], attributes=0x10, producer=7).encode()
    compacted = RawBatch([RawMessage(b"a"), RawMessage(b"b")], extra={"delta": 6}).encode()
    markers = [(marker(7, True), 1), (marker(8, False), 1)]
    log = raw_log((aborted, 2), (kept, 1), *markers, (later, 1), (marker(7, False), 1), (compacted, 7))
    transactions = [AbortedTransaction(producer_id=7, first_offset=FIRST)]
    reader = LogReader(FIRST, isolation_level="read_committed")
    records = reader.read(log, aborted_transactions=transactions)
    assert [each.value for each in records] == [b"kept", b"later", b"a", b"b"] and reader.position.offset == log.end


def test_a_marker_that_cannot_be_read_is_corrupt_and_later_transactions_are_not_lost() -> None:
    broken = RawBatch([RawMessage(b"", b"k")], attributes=0x30, producer=7).encode()
    log = raw_log((broken, 1), (RawBatch([RawMessage(b"next")], attributes=0x10, producer=7).encode(), 1))
    records = LogReader(FIRST, isolation_level="read_committed").read(log)
    assert corrupt_offsets(records) == [FIRST] and records[1].value == b"next"


def test_the_epoch_of_the_position_survives_an_empty_fetch_and_a_damaged_one() -> None:
    reader = LogReader(FIRST, epoch=3)
    reader.poll(bytes(RawBatch([RawMessage(b"a")], base=FIRST, epoch=3).encode()), FIRST + 1)
    reader.poll(b"", FIRST + 1)
    assert reader.position.leader_epoch == 3
    broken = RawBatch([RawMessage(b"a")], base=FIRST + 1, epoch=9).encode()
    reader.poll(bytes(broken), FIRST + 2)
    assert reader.position.offset == FIRST + 2 and reader.position.leader_epoch == 3, "no leader had epoch 9"
    broken[-1] ^= 1
    struct.pack_into(">q", broken, 0, FIRST + 2)
    [corrupt] = reader.poll(bytes(broken), FIRST + 3) + reader.poll(bytes(broken), FIRST + 3)
    assert corrupt.leader_epoch == 3 and reader.position == (FIRST + 3, "", 3)


def test_want_of_memory_is_not_taken_for_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any) -> bytearray:
        raise MemoryError

    log = log_of(1)
    reader = LogReader(FIRST)
    with monkeypatch.context() as patch:
        patch.setattr("streams.kafka.record_batches.decompress", exhausted)
        for _ in range(2):  # the second poll would hang if the first had left its iterator
            with pytest.raises(MemoryError):
                reader.poll(log.fetch(FIRST), log.end)
    assert len(reader.read(log)) == COUNT


def test_a_library_of_another_shape_or_a_consumer_with_deserializers_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_library()
    made = inspect.getsource(Fetcher._parse_fetched_data)
    assert "self.PartitionRecords(" in made, "a fetcher's own PartitionRecords is used"
    assert "self.drain()" in inspect.getsource(Fetcher.PartitionRecords._unpack_records)
    consumer: Any = SimpleNamespace(config={"key_deserializer": None, "value_deserializer": bytes.decode})
    with pytest.raises(ConfigError, match="value_deserializer"):
        install(consumer)
    monkeypatch.delattr(Fetcher, "_parse_fetched_data")
    with pytest.raises(ConfigError, match="_parse_fetched_data"):
        check_library()


@pytest.mark.parametrize("magic", [0, 1])
@pytest.mark.parametrize("codec", [0, 1], ids=CODECS[:2])
def test_message_sets_of_brokers_before_kafka_0_11_are_reported_offset_by_offset(magic: int, codec: int) -> None:
    builder = MemoryRecordsBuilder(magic, codec, 1 << 24, offset=0)
    for number in range(3):
        builder.append(1_000 + number if magic else None, b"key", b"value %d" % number)
    builder.close()
    log = RecordLog()
    log.append(bytearray(builder.buffer()), 3)
    found = read(log)
    assert corrupt_offsets(found) == [0, 1, 2]
    assert all(f"format has number {magic}, of Kafka before 0.11" in each.detail and each.raw for each in found)


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
    """Validate positions as ``poll`` does, with this answer of the leader to ``OffsetForLeaderEpoch``."""
    result = Topic.EpochEndOffset(partition=0, error_code=0, leader_epoch=end_epoch, end_offset=end_offset)
    answer = OffsetForLeaderEpochResponse(topics=[Topic(topic=PARTITION.topic, partitions=[result])], version=3)

    async def send(request: Any, node_id: int) -> Any:
        return answer

    reader.fetcher._manager.send = send
    asyncio.run(reader.fetcher._validate_offsets_for_node(0, {PARTITION: reader.position}))


@pytest.mark.parametrize(
    ("end_offset", "end_epoch", "expected"), [(42, 2, 42), (-1, -1, None), (POSITION, 3, POSITION)]
)
def test_a_newer_leader_has_the_position_checked_and_a_truncation_is_raised_once(
    end_offset: int, end_epoch: int, expected: int | None
) -> None:
    reader = reader_of_epoch_3()
    reader.fetcher.maybe_validate_positions()
    assert not reader.subscriptions.is_fetchable(PARTITION), "nothing is fetched before"
    validate(reader, end_offset, end_epoch)
    if expected != POSITION:
        with pytest.raises(LogTruncationError) as raised:
            reader.fetcher.validate_offsets_if_needed()
        assert truncations(raised.value) == {0: expected}, "the point of divergence"
        reader.fetcher.maybe_validate_positions()
        assert reader.fetcher.validate_offsets_if_needed() is None, "it was raised a second time"
    assert reader.subscriptions.is_fetchable(PARTITION) and reader.position.offset == POSITION, "the old position stays"
    assert not reader.poll(b"", 60, diverging_epoch=Diverging(epoch=2, end_offset=42))
    assert reader.subscriptions.is_offset_validation_needed(PARTITION), "after a fetch that diverges once more"


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
