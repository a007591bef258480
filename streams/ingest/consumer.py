"""``ratchet ingest``: from the topic into the sample store.

The loop reads and validates records, stores samples and offsets in one commit, publishes quarantined records, and only
then commits offsets to Kafka. Those only show the lag to others; the store decides where to continue. After a kill at
any moment, every record is in the store or in the quarantine topic exactly once.

Any bytes end as a sample, a duplicate, a tombstone or in quarantine, and unreadable offsets as a gap. The loop only
waits for outages: broker, store, disk, registry.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Final

from kafka.errors import KafkaError, LogTruncationError, OffsetOutOfRangeError

from core import metrics
from core.errors import BrokerError, ConfigError, RatchetError, RegistryUnavailable, StoreError, Superseded
from core.progress import progress_log
from core.settings import Settings
from ratchet_client.broker import explain
from streams.ingest.batch import Batch, CommitResult
from streams.ingest.duplicates import DuplicateIndex
from streams.ingest.ingest_report import IngestReport, IngestStatus, ThrottledLog
from streams.ingest.membership import (
    BATCH_BYTES,
    POLL_RECORDS,
    POLL_SECONDS,
    IngestClients,
    LogLost,
    Membership,
    PartitionReader,
    new_generation,
    start_position,
)
from streams.ingest.perceptual_hash import SplitRule
from streams.ingest.quarantine import BACKOFF_SECONDS, QuarantinePublisher
from streams.ingest.sources import Holds
from streams.ingest.validate import Received, quarantine_row
from streams.ingest.validators import ValidationPool, ValidationSetup, crashed, start_validators
from streams.kafka import tolerant_fetch
from streams.kafka.clients import check_rights, connection, ingest_rights
from streams.store.rows import RecordPosition, gap_row, position_of
from streams.store.sample_store import SampleStore
from streams.store.writer import StoreWriter

log = logging.getLogger(__name__)
#: On a stop: time for quarantined records to get into their topic. The next owner publishes the others.
PUBLISH_SECONDS: Final = 5.0

AWAY: Final = (BrokerError, StoreError, RegistryUnavailable, KafkaError, OSError)


class Consumer:
    """Reads the topic until :meth:`stop`. :meth:`run` blocks; ``status`` has its counts."""

    def __init__(
        self, settings: Settings, on_change: Callable[[IngestStatus], None] | None = None, processes: int = 0
    ) -> None:
        """``on_change`` is called with the status after every commit and change of state. ``processes``: validator
        processes; 0: threads of this process, which start at once and are half as fast."""
        self.settings = settings
        self.kafka = settings.kafka
        self.store = SampleStore(settings.lake)
        self._report = IngestReport(self.store, self.kafka.group, on_change)
        self._stopping = threading.Event()
        self._clients = IngestClients(self.kafka)
        self._admin = self._clients.admin()
        self._processes = processes
        self._opened = False
        self._group: Membership
        self._connected = False
        self._indexing: Future[Any] | None = None
        self._indexer = ThreadPoolExecutor(1, "duplicate-index")
        self._idle_since: float | None = None

    @property
    def status(self) -> IngestStatus:
        return self._report.status

    def stop(self) -> None:
        """Ask :meth:`run` to store what it has read, and return. Callable from any thread or a signal handler."""
        self._stopping.set()

    # -- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Read until :meth:`stop`; outages are waited out. Raises ConfigError if an option of the Kafka client is
        wrong."""
        failures = 0
        self._report.watch_store()
        try:
            while not self._stopping.is_set():
                commits = self.status.commits
                try:
                    self._connect()
                    while not self._stopping.is_set():
                        self._claim()
                        self._poll()
                        self._collect()
                        if self._batch.due:
                            self._commit()
                        self._mark_published()
                    self._finish()
                except LogLost as error:
                    progress_log.warning(f"ingest: {error}")
                except AWAY as error:
                    failures = 0 if self.status.commits > commits else failures
                    self._wait(error, failures)
                    failures += 1
                finally:
                    self._disconnect()
        finally:
            self._close()
            self._report.stopped()

    def _finish(self) -> None:
        if not self._gives_up():
            self._collect()
            self._commit()
            self._publisher.wait_until_published(PUBLISH_SECONDS)
            self._mark_published()

    def _gives_up(self) -> bool:
        """True if asked to stop while the store is unavailable: another attempt may take longer than the time left."""
        return self._stopping.is_set() and self.status.waiting_for == "store"

    # -- beginning and end ------------------------------------------------------------------------------------------

    def _open(self) -> None:
        limits, kafka, folder = self.settings.ingest, self.kafka, self.settings.home / "ingest"
        name, generated = self.store.table.identity()
        split = SplitRule(limits.own_split_key or generated, limits.fresh_eval_share)
        index = DuplicateIndex(folder / "duplicates.db", name, limits.near_duplicate_distance, split)
        self._guard, validators = start_validators(ValidationSetup(limits, kafka, generated), self._processes, folder)
        self._pool = ValidationPool(validators, 2 * BATCH_BYTES, 2 * kafka.batch_records + POLL_RECORDS)
        self._writer = StoreWriter(self.store.table)
        self._batch = Batch(kafka, self._writer, index, Holds(self.settings.trust, self.store.table))
        self._publisher = QuarantinePublisher(self._clients, self.store)
        self._opened = True

    def _close(self) -> None:
        if self._opened:
            self._pool.close()
            self._publisher.close()
            self._batch.index.interrupt()
            self._indexer.shutdown(wait=True, cancel_futures=True)
            self._batch.index.close()
            self._guard.close()
        self._admin.close()

    def _connect(self) -> None:
        if not self._opened:
            self._open()
        if self._indexing is None or self._indexing.done():
            self._indexing = self._indexer.submit(self._index)
        self._group = Membership.join(self._clients, self._admin, self.store)
        self._consumer, self._assignment = self._group.consumer, self._group.assignment
        self._connected = True

    def _index(self) -> None:
        """Read the store into the index: some 10 s per million samples for a new index. The loop polls meanwhile,
        without claiming anything, to stay in the group."""
        with self._batch.index.deciding():
            self._batch.index.follow(self.store.table)

    def _disconnect(self) -> None:
        if not self._connected:
            return
        if not self._stopping.is_set():
            self._pool.finish()
        self._commit_pending()
        self._connected = False
        self._group.leave(lambda: self.status.state != "waiting")
        self._drop(lambda reading: False)
        self._group.forget_lag()

    # -- claiming ---------------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        self._drop(self._assignment.holds)
        partitions = self._assignment.unclaimed()
        if partitions and self._indexing is not None and self._indexing.done():
            self._indexing.result()  # raises the index's error; the next connection starts over
            self._retry_until_stopped(partial(self._claim_all, partitions))

    def _claim_all(self, partitions: Sequence[int]) -> None:
        topic, known = self.kafka.topic, list(self.store.positions().values())
        firsts = {number: self._group.range(number)[0] for number in partitions}
        starts = [start_position(known, topic, self._group.topic_id, number, firsts[number]) for number in partitions]
        for claim in self._writer.claim(starts):
            position = claim.position
            reading = PartitionReader.of(claim)
            self._publisher.recover(reading)
            if self._assignment.begin(reading):
                log.info("reading %s from %d", claim.key, reading.next)
                self._skip_to(reading, firsts[position.partition])

    def _drop(self, holds: Callable[[PartitionReader], bool]) -> None:
        """Drop what was read of partitions that are no longer ours: their next owner reads it again."""
        self._pool.drop(holds)
        self._batch.drop(holds)

    # -- reading ----------------------------------------------------------------------------------------------------

    def _poll(self) -> None:
        if not self._pool.has_room:
            self._pool.wait(POLL_SECONDS)
            return
        busy = len(self._pool) > 0
        seconds = 0.0 if busy else max(0.0, min(POLL_SECONDS, self._batch.seconds_left))
        readings = {each.partition: each for each in self._assignment.all()}
        try:
            polled = self._consumer.poll(timeout_ms=int(seconds * 1000))
        except OffsetOutOfRangeError:
            self._retry_until_stopped(self._find_range)
            return
        except LogTruncationError as error:
            self._retry_until_stopped(partial(self._follow_truncation, tolerant_fetch.truncations(error)))
            return
        if (polled or self._group.look_due) and not self._retry_until_stopped(self._look):
            return  # asked to stop during an outage of the broker: what was polled stays in the log
        for partition, records in polled.items():
            reading = readings.get(partition.partition)
            if reading is not None and self._assignment.holds(reading):
                for record in records:
                    self._take(reading, record)
            elif (current := self._assignment.reading(partition.partition)) is not None:
                self._assignment.begin(current)  # claimed while polling: the records' owner is uncertain
        self._group.follow_positions()
        self._idle_since = None if polled else self._idle_since or time.monotonic()
        self._pool.flush()
        if busy and not polled:
            self._pool.wait(0.02)

    def _take(self, reading: PartitionReader, record: Any) -> None:
        if record.offset < reading.next:
            return  # taken before
        reading.next = reading.taken = record.offset + 1
        reading.next_epoch = record.leader_epoch
        position: RecordPosition = (reading.stream, reading.partition, record.offset)
        if isinstance(record, tolerant_fetch.Corrupt):
            received = Received(*position, record.raw)
            self._pool.add(reading, received, record.leader_epoch, quarantine_row(received, "corrupt", record.detail))
            return
        received = Received(*position, record.value, record.key, record.headers, record.timestamp)
        known = crashed(received, self._guard) if self._guard.is_poison(position) else None
        alone = known is None and self._guard.deaths(position) > 0  # if the process dies again, this record killed it
        if alone:
            self._pool.finish()
        self._pool.add(reading, received, record.leader_epoch, known)
        if alone:
            self._pool.finish()

    def _collect(self) -> None:
        try:
            while self._take_results():
                if self._batch.due:
                    self._commit()
        except RegistryUnavailable as error:
            self._wait(error, 1)

    def _take_results(self) -> bool:
        results = self._pool.take()
        for each in results:
            if self._assignment.holds(each.reading):
                each.reading.leader_epoch = each.leader_epoch
                self._batch.add(each.reading, each.end, each.result, each.size)
        return bool(results)

    # -- storing ----------------------------------------------------------------------------------------------------

    def _commit(self) -> bool:
        """Store the batch, publish quarantined records, commit to Kafka, in this order. False if asked to stop
        first."""
        return self._retry_until_stopped(self._store) if len(self._batch) else True

    def _store(self) -> None:
        self._batch.drop(self._assignment.holds)
        started = time.monotonic()
        try:
            outcome = self._batch.commit(self._publisher.unpublished)
        except Superseded as error:
            self._give_up(error)
            return
        if outcome.readings:
            seconds = time.monotonic() - started
            self._publish(outcome)
            self._group.tell_kafka(outcome.readings)
            self._report.committed(outcome, self._group.lag(), seconds)

    def _give_up(self, error: Superseded) -> None:
        """Drop partitions that others claimed; those still assigned are claimed again."""
        log.warning("%s", error)
        for reading in self._assignment.all():
            if reading.claim.key in error.keys:
                self._assignment.give_up(reading)

    def _publish(self, outcome: CommitResult) -> None:
        quarantined = outcome.of_kind("quarantine")
        for reading in outcome.readings:
            mine = [
                row for row in quarantined if (row["topic"], row["partition"]) == (reading.stream, reading.partition)
            ]
            self._publisher.publish(reading, mine)
        self._guard.forget(map(position_of, outcome.rows))

    def _mark_published(self) -> None:
        """Store how far quarantined records are published, and offsets without records, if no batch will do so soon."""
        if len(self._batch) or len(self._pool):
            return
        idle = self._idle_since is not None and time.monotonic() - self._idle_since >= self.kafka.batch_seconds
        moves, ahead = [], []
        for reading in self._assignment.all():
            position = before = reading.claim.position
            if idle and reading.next > position.next:
                ahead.append(reading)
                end, epoch = reading.behind(position.next)
                position = replace(position, next=end, leader_epoch=epoch)
            waiting = self._publisher.unpublished(reading)
            published = position.next if waiting is None else min(waiting, position.next)
            if published > before.published or position.next > before.next:
                moves.append((reading.claim, replace(position, published=max(published, before.published))))
        if moves:
            try:
                self._writer.commit((), moves)
                if ahead:
                    self._group.tell_kafka(ahead)
            except Superseded as error:
                self._give_up(error)
            except StoreError as error:  # done with the next batch, or by the next owner
                log.info("what was published is remembered later: %s", error)

    # -- the log ----------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Check that what was polled comes from the log read so far, and report the lag."""
        self._group.look()
        joined = self._assignment.joined
        self._report.connected(joined, self._group.lag() if joined else None)

    def _collect_all(self) -> bool:
        """Move everything read to the batch, so that what follows can be added. False if asked to stop."""
        while len(self._pool):
            self._pool.finish()
            self._collect()
            if len(self._pool) and self._stopping.is_set():
                return False
        return True

    def _find_range(self) -> None:
        """Handle an offset out of range: records were deleted before they were read, or the log was truncated."""
        for reading in self._assignment.all():
            first, end = self._group.range(reading.partition)
            if reading.next > end:
                self._cut_off(reading, None, end)
            else:
                self._skip_to(reading, first)

    def _follow_truncation(self, divergences: dict[int, int | None]) -> None:
        """Handle a truncation: records that were read are gone, and others replace them (KIP-320)."""
        for reading in self._assignment.all():
            if reading.partition in divergences:
                self._cut_off(reading, divergences[reading.partition], self._group.range(reading.partition)[1])

    def _skip_to(self, reading: PartitionReader, first: int) -> None:
        """Continue at ``first``, and store a gap for the offsets before it, which were deleted unread."""
        if reading.next >= first or not self._collect_all() or not self._assignment.holds(reading):
            return
        why = "the broker deleted them before they were read"
        row = gap_row(reading.stream, reading.partition, reading.next, first, "retention", why)
        self._batch.add(reading, first, row, 0)
        reading.next, reading.next_epoch, reading.leader_epoch = first, -1, -1
        self._assignment.begin(reading)

    def _cut_off(self, reading: PartitionReader, divergence: int | None, end: int) -> None:
        """Continue as a new generation of the topic from where the log diverges, or from its beginning if unknown. What
        was read before is stored already."""
        first = self._group.range(reading.partition)[0]  # before anything is stored, which must not be repeated
        if not self._collect_all() or not self._assignment.holds(reading):
            return
        start = min(end if divergence is None else divergence, reading.next)
        if self._commit() and self._assignment.holds(reading):
            again = first if divergence is None else divergence
            self._retry_until_stopped(partial(self._begin_generation, reading, reading.next - start, again))

    def _begin_generation(self, reading: PartitionReader, rewritten: int, start: int) -> None:
        position = reading.claim.position
        generation = new_generation(self.store.positions().values(), position, start)
        end = replace(position, tally=position.tally + Counter(rewritten_offsets=rewritten))
        try:
            [claim] = self._writer.claim([generation], (), [(reading.claim, end)])
        except Superseded as error:
            log.warning("%s", error)
            self._assignment.give_up(reading)
            return
        self._report.rewritten(claim, rewritten)
        self._assignment.begin(PartitionReader.of(claim))

    # -- waiting and telling ----------------------------------------------------------------------------------------

    def _retry_until_stopped(self, act: Callable[[], None]) -> bool:
        """Retry an action through outages; False if asked to stop before it succeeded. Raises LogLost."""
        failures = 0
        while True:
            try:
                act()
                return True
            except LogLost:
                raise
            except AWAY as error:
                self._wait(error, failures)
                failures += 1
            if self._stopping.is_set():
                return False

    def _wait(self, error: Exception, failures: int) -> None:
        known = error if isinstance(error, RatchetError) else explain(error, connection(self.kafka), "reading")
        if isinstance(known, BrokerError) and known.state == "refused":
            try:
                check_rights(self._admin, ingest_rights(self.kafka))
            except BrokerError as named:  # names the missing rights
                known = named if named.state == "refused" else known
        seconds = BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS) - 1)]
        dependency = self._report.away(known, seconds)
        if dependency == "broker" and self._connected:
            self._commit_pending()
        self._stopping.wait(seconds)
        if dependency != "broker" and self._connected:
            self._group.stay()

    def _commit_pending(self) -> None:
        """Store what was read although the broker is unreachable; quarantined records are published when it is back."""
        if self._gives_up():
            return
        try:
            while self._take_results():
                pass
        except RegistryUnavailable as error:
            log.warning("what was read is validated later: %s", error)
        try:
            self._store()
        except AWAY as error:
            log.warning("what was read is stored later: %s", error)


SWITCH_SECONDS: Final = 0.0005
"""Switch interval of the GIL: reading, committing and publishing take turns."""


def run_ingest(settings: Settings, topic: str | None = None) -> None:
    """Ingest until SIGTERM. ``topic``: one of those bound to a source. Raises ConfigError if it is none of them."""
    if topic is not None:
        try:
            settings = settings.model_copy(update={"kafka": settings.kafka.reading(topic)})
        except KeyError:
            raise ConfigError(f"--topic: {topic!r} is not bound to a source.", "Name it in `kafka.topics`.") from None
    sys.setswitchinterval(SWITCH_SECONDS)
    processes = settings.ingest.processes or os.cpu_count() or 1
    consumer = Consumer(settings, on_change=ThrottledLog(), processes=processes)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: consumer.stop())
    metrics.build.started("ingest")
    metrics.listen("ingest", settings.ingest.metrics_port, settings.metrics_host)
    progress_log.info(f"ingest: {settings.kafka.topic} at {settings.kafka.bootstrap} -> {consumer.store.url}")
    consumer.run()
