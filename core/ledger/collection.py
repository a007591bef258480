"""Queries of garbage collection: the state of adapters' files.

Files are deleted in three steps, so that no release can name them meanwhile: a transaction marks the adapter unless
something needs it; its files are deleted; the mark gets the bytes freed. Marking and releasing lock the adapter's row.
A marked adapter belongs to the collector until its files are gone; then a process that makes or imports it again may
store it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from core.errors import AdapterCollected, LedgerError, ReleaseConflict
from core.ledger.database import Queries
from core.ledger.events import note
from core.ledger.leases import check_lease, database_time
from core.ledger.rows import (
    AdapterRow,
    BaseUpgradeRow,
    ProposalRow,
    ReleaseAuditRow,
    ReleaseRow,
    UpdateRow,
    UtcTime,
    VerdictRow,
)

COLLECT_LEASE: Final = "collect"
"""The right to delete artifact files. A backup also holds it, so that nothing is deleted while it copies."""
OPEN_UPDATES: Final = ("training", "trained", "gated")
OPEN_PROPOSALS: Final = ("pending", "preparing")


@dataclass(frozen=True)
class AdapterUse:
    """Use of an adapter, from which the age of its files is counted."""

    name: str
    family: str
    base: str
    last_used: datetime
    """The latest of: its record, a state change of its update, the replacement of a release with it."""
    released: bool
    collected_at: datetime | None
    collected_bytes: int | None
    """None until its files are deleted."""


@dataclass(frozen=True)
class JudgedUpdate:
    id: str
    adapter: str
    judged_at: datetime


class CollectionQueries(Queries):
    def clock(self) -> datetime:
        """The database server's time; for SQLite this machine's."""
        with self.database.read() as session:
            return database_time(session)

    def newest_entry(self) -> datetime | None:
        """Time of the newest release, update or adapter; None in an empty ledger."""
        columns = (ReleaseRow.created_at, UpdateRow.updated_at, AdapterRow.created_at)
        with self.database.read() as session:
            times = [session.scalar(select(func.max(column, type_=UtcTime))) for column in columns]
        return max((time for time in times if time is not None), default=None)

    def adapter_uses(self) -> list[AdapterUse]:
        a = AdapterRow
        with self.database.read() as session:
            rows = session.execute(
                select(a.name, a.family, a.base, a.created_at, a.collected_at, a.collected_bytes).order_by(a.name)
            ).all()
            used = {row.name: row.created_at for row in rows}
            last = func.max(UpdateRow.updated_at, type_=UtcTime)
            updates = select(UpdateRow.adapter, last).where(UpdateRow.adapter.is_not(None)).group_by(UpdateRow.adapter)
            for name, time in session.execute(updates):
                used[name] = max(used.get(name, time), time)
            releases = session.execute(
                select(ReleaseRow.clip, ReleaseRow.vlm, ReleaseRow.created_at).order_by(ReleaseRow.number)
            ).all()
        for row, following in zip(releases, [*releases[1:], *releases[-1:]], strict=False):
            for name in filter(None, (row.clip, row.vlm)):
                used[name] = max(used.get(name, following.created_at), following.created_at)
        released = {name for row in releases for name in (row.clip, row.vlm)}
        return [
            AdapterUse(
                row.name, row.family, row.base, used[row.name], row.name in released, row.collected_at,
                row.collected_bytes,
            )
            for row in rows
        ]  # fmt: skip

    def released_bases(self) -> list[str | None]:
        return self._all(select(ReleaseRow.clip_base).distinct())

    def upgrade_bases(self) -> list[str]:
        return self._all(select(BaseUpgradeRow.new_base).distinct())

    def adapters_in_use(self) -> dict[str, str]:
        """Adapters of open proposals and unfinished updates, with the reason."""
        with self.database.read() as session:
            return _in_use(session)

    def judged_updates(self) -> list[JudgedUpdate]:
        query = select(VerdictRow.update_id, VerdictRow.adapter, VerdictRow.created_at)
        with self.database.read() as session:
            return [JudgedUpdate(*row) for row in session.execute(query)]

    def collected(self, names: Sequence[str | None]) -> dict[str, datetime]:
        """Collected adapters among ``names``, with the time."""
        return self._of_adapters(AdapterRow.collected_at, names)

    def begin_collection(self, reasons: Mapping[str, str], *, live: int, epoch: int, actor: str) -> list[str]:
        """Mark adapters for deletion; proposals and releases can no longer name them. Returns those marked now or
        before whose files are to be deleted, without those that an open proposal or unfinished update needs by now.
        ``reasons``: by adapter, for the audit. ``live``: number of the live release at the decision; 0: none. Raises
        ReleaseConflict if something was released since; LeaseLost if another collector, or a backup, took over."""
        marked = []
        with self.database.write() as session:
            check_lease(session, COLLECT_LEASE, epoch)
            rows = _locked(session, reasons)
            number = session.scalar(select(func.max(ReleaseRow.number))) or 0
            if number != live:
                raise ReleaseConflict(f"release {number} is live by now, not {live}.", "Decide again what may go.")
            needed = _in_use(session)
            now = database_time(session)
            for row in rows:
                if row.name in needed or row.collected_bytes is not None:
                    continue
                if row.collected_at is None:
                    row.collected_at = now
                    note(session, actor, "collect", f"adapter {row.name}", {"reason": reasons[row.name]})
                marked.append(row.name)
        return marked

    def finish_collection(self, freed: Mapping[str, int]) -> None:
        """Record that the files of marked adapters are deleted. ``freed``: bytes by adapter."""
        with self.database.write() as session:
            for row in _locked(session, freed):
                if row.collected_at is not None and row.collected_bytes is None:
                    row.collected_bytes = freed[row.name]


def restore_mark(row: AdapterRow) -> None:
    """Clear the mark of an adapter whose files are stored again. Raises LedgerError while its old files are being
    deleted."""
    if row.collected_at is not None and row.collected_bytes is None:
        raise LedgerError(
            f"the files of adapter {row.name!r} are being collected.", "Try again when `ratchet admin gc` has ended."
        )
    row.collected_at = row.collected_bytes = None


def check_files(session: Session, names: Iterable[str | None]) -> None:
    """Lock adapters in this transaction. Raises AdapterCollected if files of one are deleted, or will be."""
    for row in _locked(session, {name for name in names if name is not None}):
        if row.collected_at is not None:
            raise collected_error(row.name, row.collected_at)


def collected_error(name: str, time: datetime) -> AdapterCollected:
    return AdapterCollected(
        f"the files of {name} were collected on {time.astimezone(UTC):%Y-%m-%d}: it was older than gc.keep_days and "
        "outside of gc.keep_releases.",
        f"Take another release, or bring its files back: `ratchet adapters import DIR` with what `ratchet adapters "
        f"export {name} DIR` wrote earlier, or the folder adapters/{name} of a backup.",
    )


def _locked(session: Session, names: Iterable[str]) -> list[AdapterRow]:
    """Adapter rows, locked in name order until the transaction ends."""
    query = select(AdapterRow).where(AdapterRow.name.in_(list(names))).order_by(AdapterRow.name).with_for_update()
    return list(session.scalars(query.execution_options(populate_existing=True)))


def _in_use(session: Session) -> dict[str, str]:
    needed: dict[str, str] = {}
    updates = select(UpdateRow.id, UpdateRow.adapter, UpdateRow.incumbent).where(UpdateRow.state.in_(OPEN_UPDATES))
    for number, adapter, incumbent in session.execute(updates):
        needed |= {name: f"{number} is not finished" for name in (adapter, incumbent) if name}
    audits = select(ReleaseAuditRow.family, ReleaseAuditRow.adapter).where(ReleaseAuditRow.passed)
    last = {row.family: row.adapter for row in session.execute(audits.order_by(ReleaseAuditRow.id))}
    needed |= dict.fromkeys(last.values(), "the next audit compares with it")
    proposals = select(ProposalRow).where(
        ProposalRow.state.in_(OPEN_PROPOSALS), or_(ProposalRow.clip.is_not(None), ProposalRow.vlm.is_not(None))
    )
    for proposal in session.scalars(proposals):
        needed |= {name: f"proposal {proposal.id} is open" for name in (proposal.clip, proposal.vlm) if name}
    return needed
