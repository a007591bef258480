"""``ratchet maintain``: deletions, retention, compaction, indexes and cleanup of the sample store, gaps as events,
removal of old published events, and garbage collection (:mod:`ops.collection`, passed in because it is above this
module). A lease in the ledger lets one process run at a time. Readers are never blocked, and a failed run is retried.

**Compaction.** Fragments grow in tiers, as in a log-structured merge tree: small ones are merged when together they
fill a medium one, those when they fill a large one, which is only rewritten for deletions. So each byte is rewritten at
most three times after its commit, whatever the store holds. Indexes on id, key, offset and kind cover compacted rows;
each run indexes what is new, and indexes are merged when there are many.
"""

from __future__ import annotations

import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from lance.commit import CommitConflictError

from core import metrics
from core.dependencies import answered, noted
from core.digests import digest12
from core.errors import BrokerError, ConfigError, LedgerUnavailable, RatchetError, StoreUnavailable
from core.ledger import DeletionRow, DeletionState, Ledger
from core.ledger.collection import COLLECT_LEASE
from core.ledger.leases import lease_holder, renewing
from core.progress import progress_log
from core.settings import Settings
from streams.kafka.corrections import publish_corrections
from streams.kafka.events import EventPublisher
from streams.records.signatures import FEEDBACK
from streams.store import deletion, retention
from streams.store.deletion import OldVersions, is_tombstone
from streams.store.rows import name_of, outage, position_fragments, position_of
from streams.store.sample_store import BACKUP_PIN, SampleStore
from streams.store.writer import StoreWriter

log = logging.getLogger(__name__)
LEASE: Final = "maintain"
LEASE_SECONDS: Final = 120.0
CLEAN_SHARE: Final = 1 / 6
"""Old versions are removed at intervals of this share of their keeping time: each pass lists all files."""
EXPIRE_SECONDS: Final = 600.0
"""Interval of retention: each pass reads the times of all samples."""
PRUNE_SECONDS: Final = 600.0
KEEP_EVENTS_DAYS: Final = 7.0
"""Time for which the ledger keeps published events; the topic has them too."""
KEEP_FEEDBACK_DAYS: Final = 365.0
SETTLE_SECONDS: Final = 60.0
"""Minimum age of a finished deletion: records validated before it may be stored after it, and are searched for
again."""
UNLOCK_SECONDS: Final = 3600.0
"""Interval at which deletions held by the bucket are checked: a check lists all versions of all objects."""
DELETIONS_AT_ONCE: Final = 1000
PIN_HOURS: Final = 24.0
"""Time an update may stay pinned to a version from before a deletion; then the pin is removed."""


@dataclass(frozen=True, slots=True)
class MaintenanceRun:
    written: int = 0
    removed: int = 0
    freed: int = 0
    waiting: bool = False


class Maintainer:
    """Maintains one sample store."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger | None = None,
        store: SampleStore | None = None,
        collect: Callable[[], object] | None = None,
    ) -> None:
        self.settings = settings
        self.ledger = ledger or Ledger.open(settings.ledger)
        self.store = store or SampleStore(settings.lake)
        self.events = EventPublisher(settings, self.ledger)
        self._holder = lease_holder()
        self._collect_garbage = collect
        self._done_at: dict[str, float] = {}
        """Time of the last run of each periodic task, by name."""
        self._gaps = 0

    def run_once(self) -> MaintenanceRun:
        """Do one run. Raises RatchetError if the store, the ledger or the broker is unavailable; try again."""
        started = time.monotonic()
        try:
            epoch = self.ledger.acquire_lease(LEASE, self._holder, LEASE_SECONDS)
            if epoch is None:
                return MaintenanceRun(waiting=True)
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
                    progress_log.warning(f"maintain: {error}")
            except Exception:
                log.exception("maintenance")
            stopping.wait(self.settings.maintain.seconds)
        publisher.join()

    def close(self) -> None:
        try:
            row = self.ledger.lease(LEASE)
            if row is not None and row.holder == self._holder:
                self.ledger.release_lease(LEASE, row.epoch)
        except LedgerUnavailable as error:
            log.info("the lease of maintenance could not be given back (%s); it runs out by itself", error)
        self.events.close()

    def _run(self) -> MaintenanceRun:
        removed = self._delete() + self._expire()
        self._tell_gaps()
        pending = self._deletions("removed")
        written = compact(self.store, expunge=bool(pending))
        if pending and not any(each.deleted for each in _fragments(self.store)):
            self.ledger.deletions_rewritten([each.id for each in pending], self.store.version())
            pending = self._deletions("removed")
        index(self.store)
        metrics.maintain.written(written)
        self._publish_corrections()
        self._prune_ledger()
        self._collect()
        try:  # last: a store that forbids deleting ends the run here
            freed = self._clean(pending)
            self._finish(pending)
        finally:
            self._count_deletions()
            metrics.maintain.indexes(self.ledger.index_problems())
        return MaintenanceRun(written, removed, freed)

    def _due(self, name: str, seconds: float) -> bool:
        return time.monotonic() - self._done_at.get(name, -math.inf) >= seconds

    def _deletions(self, *states: DeletionState) -> list[DeletionRow]:
        return self.ledger.deletions(DELETIONS_AT_ONCE, states, oldest_first=True)

    def _delete(self) -> int:
        deletion.take_tombstones(self.store, self.ledger)
        waiting = [*self._deletions("requested"), *self._deletions("removed")]
        removed = deletion.remove(self.store, self.ledger, [each for each in waiting if is_tombstone(each)])
        for each in waiting:
            if is_tombstone(each):
                continue
            try:
                removed += deletion.remove(self.store, self.ledger, [each])
                self._forget_reports(each.selector)
            except ConfigError as error:  # requested by another version of Ratchet; must not block the others
                progress_log.info(f"maintain: {each.id} cannot be carried out: {error}")
        metrics.maintain.deleted(removed, "deletion")
        return removed

    def _forget_reports(self, selector: Mapping[str, str]) -> None:
        """With all samples that come from a caller's corrections, the caller's feedback goes, too."""
        if set(selector) == {"source", "before"} and selector["source"].startswith(FEEDBACK):
            caller = selector["source"].removeprefix(FEEDBACK)
            self.ledger.prune_feedback(datetime.fromisoformat(selector["before"]), caller)

    def _expire(self) -> int:
        if not self._due("expire", EXPIRE_SECONDS):
            return 0
        expired = retention.expire(self.store, self.settings.retention)
        if expired < retention.MOST_AT_ONCE:  # else there is more
            self._done_at["expire"] = time.monotonic()
        metrics.maintain.deleted(expired, "retention")
        return expired

    def _tell_gaps(self) -> None:
        gaps = self.store.tally()["gap"]
        if gaps == self._gaps:
            return
        for row in self.store.gaps(10_000):
            event = f"gap-{name_of(position_of(row))}"
            if len(event) > 200:
                event = f"{event[:180]}-{digest12(event.encode())}"
            data = {
                "topic": row["topic"], "partition": row["partition"], "from": row["offset"], "to": row["until"],
                "reason": row["reason"],
            }  # fmt: skip
            subject = f"{row['topic']}:{row['partition']}"
            self.ledger.record_event("ratchet.gap.v1", event, subject[:300], data)
        self._gaps = gaps

    def _publish_corrections(self) -> None:
        try:
            while publish_corrections(self.settings, self.ledger, lambda: self.store.table.identity()[1]):
                pass
        except BrokerError as error:  # the next run sends the others
            noted(error)

    def _prune_ledger(self) -> None:
        if not self._due("prune", PRUNE_SECONDS):
            return
        self.ledger.prune_events(datetime.now(UTC) - timedelta(days=KEEP_EVENTS_DAYS))
        self.ledger.prune_feedback(datetime.now(UTC) - timedelta(days=KEEP_FEEDBACK_DAYS))
        self._done_at["prune"] = time.monotonic()

    def _clean(self, pending: list[DeletionRow]) -> int:
        """Remove old versions: periodically, and on each run while a deletion waits for it."""
        keep = timedelta(seconds=self.settings.maintain.keep_seconds)
        if not (pending or self._due("clean", keep.total_seconds() * CLEAN_SHARE)):
            return 0
        self._done_at["clean"] = time.monotonic()
        self._unpin(pending)
        self._drop_pins()
        freed = clean(self.store, keep)
        metrics.maintain.versions(len(self.store.versions()))
        return freed

    def _unpin(self, pending: list[DeletionRow]) -> None:
        late = datetime.now(UTC) - timedelta(hours=PIN_HOURS)
        versions = [each.version or 0 for each in pending if each.removed_at is not None and each.removed_at < late]
        for name, version in self.store.pins().items():
            if versions and version < max(versions):
                progress_log.info(f"maintain: {name} is pinned to samples that were deleted; it has to begin again")
                self._let_go(name)

    def _drop_pins(self) -> None:
        """Remove pins of finished updates and backups: the process that held one may have died first."""
        pins = self.store.pins()
        copying = any(name.startswith(BACKUP_PIN) for name in pins) and self.ledger.lease_is_held(COLLECT_LEASE)
        for name in pins:
            over = not copying if name.startswith(BACKUP_PIN) else self.ledger.is_finished(name)
            if over:
                self._let_go(name)

    def _let_go(self, name: str) -> None:
        """Delete what an update has computed from a version on this machine, then unpin it. On other machines the
        updater deletes it."""
        if not name.startswith(BACKUP_PIN):
            shutil.rmtree(self.settings.update_folders / name, ignore_errors=True)
        self.store.unpin(name)

    def _collect(self) -> None:
        hours = self.settings.gc.hours
        if self._collect_garbage is not None and hours and self._due("collect", hours * 3600):
            self._collect_garbage()
            self._done_at["collect"] = time.monotonic()

    def _finish(self, pending: list[DeletionRow]) -> None:
        """Finish deletions when no store version and no object version has the deleted rows any more."""
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
                words, until = left
                self.ledger.deletion_held(each.id, words, until)
                progress_log.info(f"maintain: {each.id}: {words}")
                continue
            self.ledger.deletion_done(each.id, old.unknown or None)
            progress_log.info(
                f"maintain: {each.id} is done: {each.samples} samples and {each.refusals} quarantined records are gone"
            )

    def _unlocked(self) -> list[DeletionRow]:
        now = datetime.now(UTC)
        if not self._due("unlock", UNLOCK_SECONDS):
            return []
        self._done_at["unlock"] = time.monotonic()
        return [each for each in self._deletions("held") if each.remains_until is None or each.remains_until <= now]

    def _count_deletions(self) -> None:
        oldest = self.ledger.oldest_deletion()
        age = 0.0 if oldest is None else (datetime.now(UTC) - oldest.requested_at).total_seconds()
        metrics.maintain.deletions(self.ledger.count_deletions(states=["requested", "removed", "held"]), age)


def run_maintain(settings: Settings, once: bool = False, collect: Callable[[], object] | None = None) -> None:
    if once:
        with closing(Maintainer(settings, collect=collect)) as maintainer:
            progress_log.info(f"maintain: {maintainer.run_once()}")
        return
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stopping.set())
    metrics.build.started("maintain")
    metrics.listen("maintain", settings.maintain.metrics_port, settings.metrics_host)
    if (ledger := wait_for_ledger(settings, stopping)) is None:
        return
    with closing(Maintainer(settings, ledger, collect=collect)) as maintainer:
        progress_log.info(f"maintain: {maintainer.store.url}, every {settings.maintain.seconds:g} s")
        maintainer.run(stopping)


def wait_for_ledger(settings: Settings, stopping: threading.Event) -> Ledger | None:
    """Wait for the ledger; None if ``stopping`` is set first. Its disk may be full, which this process can change.
    Raises LedgerError if it is from another version."""
    last_error = ""
    while not stopping.is_set():
        try:
            return Ledger.open(settings.ledger)
        except LedgerUnavailable as error:
            if str(error) != last_error:
                last_error = str(error)
                progress_log.warning(f"maintain waits: {error}")
            stopping.wait(settings.maintain.seconds)
    return None


FULL_ROWS: Final = 65_536
FULL_BYTES: Final = 256 << 20
"""A fragment of this size is full. Ten million samples of 20 KB make 800 of them, and a manifest of 200 KB per
version."""
TIERS: Final = (1 / 512, 1 / 16, 1.0)
"""Sizes, as shares of a full fragment, at which smaller ones are merged. The first is for streams that bring a few
records per commit."""
MANY: Final = 64
"""This many fragments below the first tier are merged whatever their size."""
HOLES: Final = 0.5
"""Share of deleted rows above which a fragment is rewritten to free space."""
INDEXES: Final = {
    "by_id": ("id", "BTREE"), "by_key": ("key", "BTREE"), "by_offset": ("offset", "ZONEMAP"),
    "by_kind": ("kind", "BITMAP"),
}  # fmt: skip
MOST_DELTAS: Final = 8
ROWS_AT_ONCE: Final = 64
"""Rows in memory while a fragment is rewritten: at 8 MiB per image, at most 512 MiB."""


@dataclass(frozen=True, slots=True)
class Fragment:
    id: int
    rows: int
    size: int
    deleted: int

    @property
    def share(self) -> float:
        """Share of a full fragment."""
        return max(self.rows / FULL_ROWS, self.size / FULL_BYTES)


def plan(fragments: Sequence[Fragment], expunge: bool = False) -> list[list[int]]:
    """Plan sets of fragments, each to be merged into one. Half-deleted fragments are rewritten, so that retention
    writes less than a byte for each byte it removes; with ``expunge``, fragments with any deleted row are."""
    most = 0 if expunge else HOLES
    sets = [[each.id] for each in fragments if each.deleted > most * each.rows]
    taken = {number for each in sets for number in each}
    for bound in TIERS:
        group: list[Fragment] = []
        for fragment in fragments:
            if fragment.share >= bound or fragment.id in taken:
                continue
            group.append(fragment)
            enough = sum(each.share for each in group) >= bound or (bound == TIERS[0] and len(group) >= MANY)
            if enough and len(group) > 1:
                sets.append([each.id for each in group])
                taken.update(sets[-1])
                group = []
    return sets


def compact(store: SampleStore, expunge: bool = False) -> int:
    """Merge fragments as :func:`plan` says. Returns the bytes written. Safe next to running workers, which never touch
    what is merged here; positions are left alone. Raises StoreUnavailable if the store cannot be read or written."""
    written = 0
    while sets := plan(_fragments(store), expunge):
        size = StoreWriter(store.table).merge(sets[0], ROWS_AT_ONCE)
        if not size:
            break  # another process is changing these; leave them to the next run
        written += size
    return written


def index(store: SampleStore) -> None:
    dataset = store.table.open()
    if dataset is None:
        return
    full = {each.id for each in _fragments(store) if each.share >= TIERS[-1] / 2}
    described: dict[str, list[set[int]]] = {name: [] for name in INDEXES}
    for each in dataset.list_indices():
        described.setdefault(each["name"], []).append(set(each["fragment_ids"]))
    for name, (column, kind) in INDEXES.items():
        deltas = described[name]
        if not full - set().union(*deltas):
            continue
        try:
            if not deltas:
                dataset.create_scalar_index(column, kind, name=name)
            else:
                merged = len(deltas) if len(deltas) >= MOST_DELTAS else 0
                dataset.optimize.optimize_indices(num_indices_to_merge=merged, index_names=[name])
        except CommitConflictError as error:
            log.info("index %s is brought up to date later: %s", name, error)
        except (OSError, RuntimeError) as error:
            raise outage(store.url, "indexed", error) from error


def clean(store: SampleStore, keep: timedelta) -> int:
    """Remove unpinned versions older than ``keep`` and the files that only they used. Returns the bytes removed. Raises
    StoreUnavailable if the store cannot be read, or some files could not be deleted."""
    dataset = store.table.open()
    if dataset is None:
        return 0
    try:
        stats = dataset.cleanup_old_versions(older_than=keep, error_if_tagged_old_versions=False)
    except (OSError, RuntimeError) as error:
        raise outage(store.url, "cleaned", error) from error
    if stats.failed_deletes:
        raise StoreUnavailable(
            f"{stats.failed_deletes} files of old versions of the sample store {store.url} were not deleted.",
            "Allow the credentials to delete objects under `lake_url` (S3: s3:DeleteObject).",
            "refused",
        )
    return int(stats.bytes_removed)


def _fragments(store: SampleStore) -> list[Fragment]:
    dataset = store.table.open()
    if dataset is None:
        return []
    positions = {each.fragment_id for each in position_fragments(dataset)}
    return [
        Fragment(
            int(each.fragment_id),
            int(each.metadata.physical_rows),
            sum(file.file_size_bytes or 0 for file in each.data_files()),
            each.num_deletions,
        )
        for each in dataset.get_fragments()
        if each.fragment_id not in positions
    ]
