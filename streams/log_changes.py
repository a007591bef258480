"""What becomes of offsets that the log does not have any more.

Records that were deleted before they were read are skipped, and lost: a gap. A log that was cut off is read on from
where it diverges, as a new generation of the topic; what was read before is stored already.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

from core.errors import Superseded
from streams.assignment import Reading, new_generation
from streams.consumer_parts import Connection, ConsumerParts
from streams.ingest_report import IngestReport
from streams.log_watch import gap
from streams.store import SampleStore

log = logging.getLogger(__name__)


class Loop(Protocol):
    """The consumer's loop."""

    def collect_all(self) -> bool:
        """Move all that was read to the batch, so that what comes behind it can be added. False when asked to stop."""

    def commit(self) -> bool:
        """Store the batch. False when asked to stop before."""

    def patiently(self, act: Callable[[], None]) -> bool:
        """Do what needs something that may be away; False when asked to stop before it was there."""


class LogChanges:
    """Follows what happens to the log of the partitions that are read."""

    def __init__(
        self, parts: ConsumerParts, connection: Connection, store: SampleStore, report: IngestReport, loop: Loop
    ) -> None:
        self._batch, self._writer = parts.batch, parts.writer
        self._assignment, self._log = connection.assignment, connection.log
        self._store = store
        self._report = report
        self._loop = loop

    def find_range(self) -> None:
        """An offset is not in the log: its records were deleted before they were read, or the log was cut off."""
        for reading in self._assignment.all():
            first, end = self._log.range(reading.partition)
            if reading.next > end:
                self._cut_off(reading, None, end)
            else:
                self.skip_to(reading, first)

    def follow_truncation(self, divergences: dict[int, int | None]) -> None:
        """Records that were read are gone, and others stand in their place (KIP-320)."""
        for reading in self._assignment.all():
            if reading.partition in divergences:
                self._cut_off(reading, divergences[reading.partition], self._log.range(reading.partition)[1])

    def skip_to(self, reading: Reading, first: int) -> None:
        """Go on at ``first``; what lies before it was deleted unread, which is a row."""
        if reading.next >= first or not self._loop.collect_all() or not self._assignment.holds(reading):
            return
        self._batch.add(reading, first, gap(reading, reading.next, first), 0)
        reading.next, reading.next_epoch, reading.leader_epoch = first, -1, -1
        self._assignment.begin(reading)

    def _cut_off(self, reading: Reading, divergence: int | None, end: int) -> None:
        """Read on as a new generation from where the log diverges; from its beginning where that is not known."""
        first = self._log.range(reading.partition)[0]  # before anything is stored, which must not be repeated
        if not self._loop.collect_all() or not self._assignment.holds(reading):
            return
        start = min(end if divergence is None else divergence, reading.next)
        if self._loop.commit() and self._assignment.holds(reading):
            again = first if divergence is None else divergence
            self._loop.patiently(partial(self._begin_anew, reading, reading.next - start, again))

    def _begin_anew(self, reading: Reading, rewritten: int, start: int) -> None:
        """Count the offsets that were rewritten, and store the new generation, in one commit."""
        position = reading.claim.position
        generation = new_generation(self._store.positions().values(), position, start)
        end = replace(position, tally=position.tally + Counter(rewritten_offsets=rewritten))
        try:
            [claim] = self._writer.claim([generation], (), [(reading.claim, end)])
        except Superseded as error:
            log.warning("%s", error)
            self._assignment.give_up(reading)
            return
        self._report.rewritten(claim, rewritten)
        self._assignment.begin(Reading.of(claim))
