"""A KafkaConsumer whose ``poll`` steps over what kafka-python cannot read, and says so.

By itself, kafka-python 3.0 raises out of ``poll`` when a batch has a wrong checksum, an unknown format or a broken
payload, or one record of it a header name that is not UTF-8. The position stays, so the same happens for ever; a second
``poll`` of the same consumer does not even return, because the exhausted iterator is never dropped. After ``install``,
each such offset comes out of ``poll`` as a ``Corrupt`` in the place of its record, and the position moves past it.

>>> consumer = KafkaConsumer(bootstrap_servers="127.0.0.1:19092", auto_offset_reset="none")  # doctest: +SKIP
>>> install(consumer)  # doctest: +SKIP

Where it hooks in: a fetcher makes ``self.PartitionRecords(...)`` in ``_parse_fetched_data``. Both are replaced on the
one fetcher. Transactions, control batches, positions and metrics stay kafka-python's own code: it is given batches
(``fetched_batches``, ``record_batches``) that never raise, and whose unreadable records carry their ``Corrupt`` in the
field of the checksum.

Truncation (KIP-320), as kafka-python 3.0.12 does it
----------------------------------------------------
A position has the leader epoch of the record before it. When the cluster's epoch becomes newer, or a fetch (version 12)
says that the logs diverge, the fetcher asks the leader (``OffsetForLeaderEpoch``) in the background. If the log ends
before the position and there is no reset policy (``auto_offset_reset="none"``), a *later* ``poll`` raises
``LogTruncationError``, before it returns any record. Its ``divergent_offsets`` has ``{TopicPartition:
OffsetAndMetadata(end offset, "", end epoch) or None}``, of several partitions maybe; None: the leader does not know the
epoch, so where the logs part is not known. (With a reset policy it seeks by itself, without a word.)

It is raised once: the partition counts as validated and can be fetched again at the *old* position. A broker of fetch
version 12 answers that with the divergence again, so the error comes back; an older one sends whatever replaced the
lost records. So seek at once. ``KafkaConsumer.seek`` takes an int only, and a position without an epoch is not
validated until a record has been read from there: ``seek`` of this module gives the epoch along, and is also what a
stored position is to be restored with. (kafka-python forgets the epoch whenever a fetch was empty; ``install`` keeps
it.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import kafka
from kafka import KafkaConsumer, OffsetAndMetadata, TopicPartition
from kafka.consumer.fetcher import CompletedFetch, ConsumerRecord, Fetcher
from kafka.consumer.subscription_state import SubscriptionState
from kafka.errors import LogTruncationError
from kafka.record.default_records import DefaultRecordBatch
from kafka.record.legacy_records import LegacyRecordBatch

from core.errors import ConfigError
from streams.fetched_batches import FetchedBatches, Suspects
from streams.record_batches import Corrupt

__all__ = ["MAX_BATCH_BYTES", "Corrupt", "install", "seek", "truncations"]

#: Most bytes that a compressed batch may expand to: the largest record that Ratchet reads is as large.
MAX_BATCH_BYTES = 64 * 1024 * 1024


def install(consumer: KafkaConsumer, max_batch_bytes: int = MAX_BATCH_BYTES) -> None:
    """Make ``poll`` of this consumer give a ``Corrupt`` for each offset that cannot be read.

    ``max_batch_bytes``: a batch that expands to more is not read, and each of its offsets is corrupt.

    Raises:
        ConfigError: the installed kafka-python is built differently from what this relies on, or the consumer has
            deserializers (which would be given None for what is corrupt).
    """
    check_library()
    for name in ("key_deserializer", "value_deserializer"):
        if consumer.config[name] is not None:
            raise ConfigError(f"the consumer has a {name}.", "Decode what `poll` returns instead.")
    fetcher = consumer._fetcher
    fetcher.PartitionRecords = TolerantRecords
    fetcher._parse_fetched_data = _Parser(fetcher, max_batch_bytes).parse


class TolerantRecords(Fetcher.PartitionRecords):  # type: ignore[misc]
    """The records of one partition in one fetch response."""

    #: Set before the first record is taken.
    batches: FetchedBatches
    #: The newest leader epoch that the cluster has told of, -1 if none. A batch's own is not covered by its checksum.
    newest_epoch = -1
    _leader_epoch = -1
    next_fetch_offset: int

    @property
    def leader_epoch(self) -> int:
        """Of the last batch, or of the position before it."""
        return self._leader_epoch

    @leader_epoch.setter
    def leader_epoch(self, epoch: int) -> None:
        if epoch >= 0 and (epoch <= self.newest_epoch or self.newest_epoch < 0):
            self._leader_epoch = epoch

    def _unpack_records(self, tp: TopicPartition, records: Any, *deserializers: Any) -> Iterator[Any]:
        try:
            for record in super()._unpack_records(tp, self.batches, *deserializers):
                corrupt = record.checksum
                yield replace(corrupt, leader_epoch=record.leader_epoch) if isinstance(corrupt, Corrupt) else record
        except Exception:
            self.drain()  # or the next poll would take from an iterator that has ended, for ever
            raise
        self.next_fetch_offset = max(self.next_fetch_offset, self.fetch_offset)


class _Parser:
    """Stands in for ``Fetcher._parse_fetched_data``."""

    def __init__(self, fetcher: Fetcher, max_batch_bytes: int) -> None:
        self._fetcher = fetcher
        self._library: Callable[[CompletedFetch], TolerantRecords | None] = fetcher._parse_fetched_data
        self._limit = max_batch_bytes
        self._suspects = Suspects()

    def parse(self, completed: CompletedFetch) -> TolerantRecords | None:
        """Let kafka-python check the response, and give it batches that do not raise to read."""
        response, partition = completed.partition_data, completed.topic_partition
        data, response.records = response.records or b"", b""  # kafka-python would raise for a batch that is cut off
        records = self._library(completed)
        if records is not None:
            state = self._fetcher._subscriptions.assignment[partition]
            epoch = self._fetcher._manager.cluster.leader_epoch_for_partition(partition)
            records.newest_epoch = -1 if epoch is None else epoch
            records.leader_epoch = state.position.leader_epoch
            records.batches = FetchedBatches(
                data, partition, completed.fetched_offset, response.high_watermark, self._limit, self._suspects
            )
        return records


def truncations(error: LogTruncationError) -> dict[int, int | None]:
    """Partitions whose log was cut off behind what was read: the first offset that is lost, None if it is not known."""
    divergences = error.divergent_offsets
    return {
        partition.partition: None if divergence is None else divergence.offset
        for partition, divergence in divergences.items()
    }


def seek(consumer: KafkaConsumer, partition: TopicPartition, offset: int, leader_epoch: int = -1) -> None:
    """Go on at ``offset``.

    ``leader_epoch``: of the record before it, so that a truncation is noticed before the first fetch, too.

    Raises:
        ValueError: the partition is not assigned.
    """
    consumer.seek(partition, offset)
    if leader_epoch >= 0:
        consumer._subscription.seek(partition, OffsetAndMetadata(offset, "", leader_epoch))


def position(consumer: KafkaConsumer, partition: TopicPartition) -> OffsetAndMetadata | None:
    """The offset that the next fetch asks for, behind all that ``poll`` returned or left out, with the leader epoch of
    what lies before it. None where there is none, or the partition is not assigned.
    """
    state = consumer._subscription.assignment.get(partition)
    return None if state is None else state.position


def check_library() -> None:
    """Raises ConfigError if kafka-python is not built as this module relies on."""
    expected: list[tuple[Any, str, list[str]]] = [
        (Fetcher, "_parse_fetched_data", ["self", "completed_fetch"]),
        (
            Fetcher.PartitionRecords,
            "_unpack_records",
            ["self", "tp", "records", "key_deserializer", "value_deserializer"],
        ),
        (Fetcher.PartitionRecords, "drain", ["self"]),
        (DefaultRecordBatch, "__init__", ["self", "buffer"]),
        (DefaultRecordBatch, "_maybe_uncompress", ["self"]),
        (DefaultRecordBatch, "_read_msg", ["self", "decode_varint"]),
        (LegacyRecordBatch, "__init__", ["self", "buffer", "magic"]),
        (LegacyRecordBatch, "_decompress", ["self", "key_offset"]),
        (LegacyRecordBatch, "_read_key_value", ["self", "pos"]),
        (SubscriptionState, "seek", ["self", "partition", "offset"]),
    ]
    for owner, name, parameters in expected:
        function = getattr(owner, name, None)
        if function is None or list(inspect.signature(function).parameters) != parameters:
            _reject(f"{owner.__qualname__}.{name}({', '.join(parameters)})")
    slots = {"_buffer", "_pos", "_num_records", "_next_record_index", "_decompressed"}
    for owner, names, needed in (
        (DefaultRecordBatch, DefaultRecordBatch.__slots__, slots),
        (ConsumerRecord, ConsumerRecord._fields, {"checksum", "leader_epoch"}),
        (CompletedFetch, CompletedFetch._fields, {"topic_partition", "fetched_offset", "partition_data"}),
    ):
        for missing in needed - set(names):
            _reject(f"{owner.__qualname__}.{missing}")


def _reject(what: str) -> None:
    raise ConfigError(
        f"kafka-python {kafka.__version__} has no {what}, which stepping over corrupt records relies on.",
        "Install the version that Ratchet was tested with: pip install 'kafka-python==3.0.12'.",
    )
