"""``ratchet maintain``: what keeps the sample store compact and its promises kept, beside the workers that write it.

One run after another: tombstones become deletions, deletions and retention remove rows, small data files are merged and
indexed, old versions go, gaps are told to others, events that were published long ago leave the ledger, and garbage is
collected (:mod:`ops.collection`, which is above this module and handed in). One process does it at a time, by a lease
in the ledger; a second one waits. Nothing here holds up reading, and a run that fails is tried again.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from core import metrics
from core.dependencies import answered, noted
from core.digests import digest12
from core.errors import ConfigError, LedgerUnavailable, RatchetError
from core.ledger import DeletionRow, DeletionState, Ledger
from core.ledger.collection import COLLECT_LEASE
from core.ledger.leases import renewing
from core.progress import say
from core.settings import Settings
from streams.kafka.events import EventPublisher
from streams.store import compaction, deletion, retention
from streams.store.deletion import is_tombstone, remove_together
from streams.store.object_versions import OldVersions
from streams.store.rows import name_of, position_of
from streams.store.sample_store import BACKUP_PIN, SampleStore

log = logging.getLogger(__name__)
LEASE: Final = "maintain"
LEASE_SECONDS: Final = 120.0
CLEAN_SHARE: Final = 1 / 6
"""Old versions are looked for after this share of the time for which they are kept: a look lists all files."""
EXPIRE_SECONDS: Final = 600.0
"""Retention looks so often: a look reads the times of all samples."""
PRUNE_SECONDS: Final = 600.0
SETTLE_SECONDS: Final = 60.0
"""A deletion is not done before that: what was validated before it may be stored after it, and is looked for again."""
UNLOCK_SECONDS: Final = 3600.0
"""Deletions that the bucket held are looked after so often: a look lists all versions of all objects."""
DELETIONS_AT_ONCE: Final = 1000
PIN_HOURS: Final = 24.0
"""An update that is pinned to a version from before a deletion has this long; then the pin goes, and it begins anew."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a run of maintenance did."""

    written: int = 0
    """Bytes of data files written anew."""
    removed: int = 0
    """Rows that deletions and retention took out."""
    freed: int = 0
    """Bytes of files removed with old versions."""
    events: int = 0
    waiting: bool = False
    """Another process holds the lease: nothing was done."""


class Maintainer:
    """Maintains one sample store.

    >>> Maintainer(settings).run_once()
    Run(written=0, removed=0, ...)
    """

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger | None = None,
        store: SampleStore | None = None,
        collect: Callable[[], object] | None = None,
    ) -> None:
        """``collect``: called every ``gc.hours``."""
        self.settings = settings
        self.ledger = ledger or Ledger.open(settings.ledger)
        self.store = store or SampleStore(settings.lake)
        self.events = EventPublisher(settings, self.ledger)
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._collect_garbage = collect
        self._cleaned_at = self._expired_at = self._pruned_at = self._collected_at = self._unlocked_at = -math.inf
        self._gaps = 0

    def run_once(self) -> Run:
        """Do what there is to do.

        Raises:
            RatchetError: the store, the ledger or the broker is away; to be tried again.
        """
        started = time.monotonic()
        try:
            epoch = self.ledger.acquire_lease(LEASE, self._holder, LEASE_SECONDS)
            if epoch is None:
                return Run(waiting=True)
            with renewing(self.ledger, LEASE, epoch, LEASE_SECONDS):
                run = self._run()
        except Exception as error:
            metrics.maintain.ran("failed", time.monotonic() - started)
            noted(error)
            raise
        answered(["ledger", "store"])
        metrics.maintain.ran("done", time.monotonic() - started)
        return run

    def run(self, stopping: threading.Event) -> None:
        """Run again and again until ``stopping``; what is away is waited for."""
        publisher = threading.Thread(target=self.events.run, args=(stopping,), name="events")
        publisher.start()
        last_error = ""
        while not stopping.is_set():
            try:
                self.run_once()
                last_error = ""
            except RatchetError as error:
                if str(error) != last_error:
                    last_error = str(error)
                    say(f"maintain: [yellow]{error}[/yellow]")
            except Exception:
                log.exception("maintenance")
            stopping.wait(self.settings.maintain.seconds)
        publisher.join()

    def close(self) -> None:
        """Let the lease and the connections go."""
        try:
            row = self.ledger.lease(LEASE)
            if row is not None and row.holder == self._holder:
                self.ledger.release_lease(LEASE, row.epoch)
        except LedgerUnavailable as error:
            log.info("the lease of maintenance could not be given back (%s); it runs out by itself", error)
        self.events.close()

    def _run(self) -> Run:
        removed = self._delete() + self._expire()
        self._tell_gaps()
        pending = self._deletions("removed")
        written = compaction.compact(self.store, expunge=bool(pending))
        if pending and not compaction.has_deleted_rows(self.store):
            self.ledger.deletions_rewritten([each.id for each in pending], self.store.version())
            pending = self._deletions("removed")
        compaction.index(self.store)
        metrics.maintain.written(written)
        self._prune_events()
        self._collect()
        try:  # last: a store that lets nothing be deleted ends a run here
            freed = self._clean(pending)
            self._finish(pending)
        finally:
            self._count_deletions()
        return Run(written, removed, freed)

    def _deletions(self, *states: DeletionState) -> list[DeletionRow]:
        return self.ledger.deletions(DELETIONS_AT_ONCE, states, oldest_first=True)

    def _delete(self) -> int:
        """Take out what deletions select; also what came to the store since they were carried out."""
        deletion.take_tombstones(self.store, self.ledger)
        waiting = [*self._deletions("requested"), *self._deletions("removed")]
        removed = remove_together(self.store, self.ledger, [each for each in waiting if is_tombstone(each)])
        for each in waiting:
            if is_tombstone(each):
                continue
            try:
                removed += deletion.remove(self.store, self.ledger, each)
            except ConfigError as error:  # of another version of Ratchet; the others are not to wait for it
                say(f"maintain: {each.id} cannot be carried out: {error}")
        metrics.maintain.deleted(removed, "deletion")
        return removed

    def _expire(self) -> int:
        """Take out what is over the limits of retention."""
        if time.monotonic() - self._expired_at < EXPIRE_SECONDS:
            return 0
        expired = retention.expire(self.store, self.settings.retention)
        if expired < retention.MOST_AT_ONCE:  # else there is more
            self._expired_at = time.monotonic()
        metrics.maintain.deleted(expired, "retention")
        return expired

    def _tell_gaps(self) -> None:
        """Record an event for each gap. A gap is a row of the store; the event's id follows from it."""
        gaps = self.store.tally()["gap"]
        if gaps == self._gaps:
            return
        for row in self.store.gaps(10_000):
            position = name_of(position_of(row))
            data = {
                "topic": row["topic"], "partition": row["partition"], "from": row["offset"], "to": row["until"],
                "reason": row["reason"],
            }  # fmt: skip
            subject = f"{row['topic']}:{row['partition']}"
            self.ledger.record_event("ratchet.gap.v1", _event_id(position), subject[:300], data)
        self._gaps = gaps

    def _prune_events(self) -> None:
        """Take events out of the ledger that were published long ago: whoever wants them reads the topic."""
        days = self.settings.maintain.keep_events_days
        if not days or time.monotonic() - self._pruned_at < PRUNE_SECONDS:
            return
        self.ledger.prune_events(datetime.now(UTC) - timedelta(days=days))
        self._pruned_at = time.monotonic()

    def _clean(self, pending: list[DeletionRow]) -> int:
        """Remove old versions: now and then, and at each run while a deletion waits for it."""
        keep = timedelta(seconds=self.settings.maintain.keep_seconds)
        due = time.monotonic() - self._cleaned_at > keep.total_seconds() * CLEAN_SHARE
        if not (due or pending):
            return 0
        self._cleaned_at = time.monotonic()
        self._unpin(pending)
        self._drop_pins()
        freed = compaction.clean(self.store, keep)
        metrics.maintain.versions(len(self.store.versions()))
        return freed

    def _unpin(self, pending: list[DeletionRow]) -> None:
        """Let go versions from before a deletion that an update has been pinned to for too long."""
        late = datetime.now(UTC) - timedelta(hours=PIN_HOURS)
        versions = [each.version or 0 for each in pending if each.removed_at is not None and each.removed_at < late]
        for name, version in self.store.pins().items():
            if versions and version < max(versions):
                say(f"maintain: {name} is pinned to samples that were deleted; it has to begin anew")
                self._let_go(name)

    def _drop_pins(self) -> None:
        """Let go the versions of updates and backups that are over: who finished one may have died before it did."""
        pins = self.store.pins()
        lease = self.ledger.lease(COLLECT_LEASE) if any(name.startswith(BACKUP_PIN) for name in pins) else None
        copying = lease is not None and bool(lease.holder) and lease.expires_at > self.ledger.clock()
        for name in pins:
            over = not copying if name.startswith(BACKUP_PIN) else self.ledger.is_finished(name)
            if over:
                self._let_go(name)

    def _let_go(self, name: str) -> None:
        """Unpin a version, after what an update has computed of its samples is gone from this machine. On another one
        the updater removes it."""
        if not name.startswith(BACKUP_PIN):
            shutil.rmtree(self.settings.update_folders / name, ignore_errors=True)
        self.store.unpin(name)

    def _collect(self) -> None:
        hours = self.settings.gc.hours
        if self._collect_garbage is None or not hours or time.monotonic() - self._collected_at < hours * 3600:
            return
        self._collect_garbage()
        self._collected_at = time.monotonic()

    def _finish(self, pending: list[DeletionRow]) -> None:
        """A deletion is done when no version of the store is left that has what it deleted, and none of an object."""
        oldest = min(self.store.versions(), default=0) if pending else 0
        settled = datetime.now(UTC) - timedelta(seconds=SETTLE_SECONDS)
        ready = [
            each
            for each in pending
            if each.version is not None and oldest >= each.version and each.requested_at <= settled
        ]
        ready += self._unlocked()
        if not ready:
            return
        old = OldVersions(self.settings.lake)
        old.purge()
        for each in ready:
            left = old.left(each.held_at or datetime.now(UTC))
            if left is not None:
                self.ledger.deletion_held(each.id, left.words, left.until)
                say(f"maintain: {each.id}: {left.words}")
                continue
            self.ledger.deletion_done(each.id, old.unknown or None)
            say(f"maintain: {each.id} is done: {each.samples} samples and {each.refusals} refusals are gone")

    def _unlocked(self) -> list[DeletionRow]:
        """Deletions whose lock in the bucket is over, or has no end that is known: those now and then."""
        now = datetime.now(UTC)
        if time.monotonic() - self._unlocked_at < UNLOCK_SECONDS:
            return []
        self._unlocked_at = time.monotonic()
        return [each for each in self._deletions("held") if each.remains_until is None or each.remains_until <= now]

    def _count_deletions(self) -> None:
        oldest = self.ledger.oldest_deletion()
        age = 0.0 if oldest is None else (datetime.now(UTC) - oldest.requested_at).total_seconds()
        metrics.maintain.deletions(self.ledger.count_deletions(states=["requested", "removed", "held"]), age)


def _event_id(position: str) -> str:
    """Of a gap; that of a topic with a long name is cut off, and stays one of its own."""
    name = f"gap-{position}"
    return name if len(name) <= 200 else f"{name[:180]}-{digest12(name.encode())}"


def run_maintain(settings: Settings, once: bool = False, collect: Callable[[], object] | None = None) -> None:
    """Maintain the sample store until SIGTERM or SIGINT; or do one run. ``collect``: see :class:`Maintainer`."""
    if once:
        with closing(Maintainer(settings, collect=collect)) as maintainer:
            say(f"maintain: {maintainer.run_once()}")
        return
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stopping.set())
    metrics.build.started("maintain")
    metrics.listen("maintain", settings.maintain.metrics_port, settings.metrics_host)
    if (ledger := wait_for_ledger(settings, stopping)) is None:
        return
    with closing(Maintainer(settings, ledger, collect=collect)) as maintainer:
        say(f"maintain: {maintainer.store.url}, every {settings.maintain.seconds:g} s")
        maintainer.run(stopping)


def wait_for_ledger(settings: Settings, stopping: threading.Event) -> Ledger | None:
    """The ledger, as soon as it can be used; None when that is waited for no more. Its disk may be full, which this
    process is there to change.

    Raises LedgerError where it is of another version.
    """
    last_error = ""
    while not stopping.is_set():
        try:
            return Ledger.open(settings.ledger)
        except LedgerUnavailable as error:
            if str(error) != last_error:
                last_error = str(error)
                say(f"maintain waits: [yellow]{error}[/yellow]")
            stopping.wait(settings.maintain.seconds)
    return None
