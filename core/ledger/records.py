"""Queries of deletions, with the adapters that learned from the data, and of resubmitted records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import func, or_, select, update
from sqlalchemy.exc import IntegrityError

from core.digests import digest12
from core.errors import AlreadyResubmitted, LedgerError
from core.ledger.database import Queries
from core.ledger.events import add_event, note
from core.ledger.rows import DeletionRow, DeletionState, ResubmissionRow, utc_now


class RecordQueries(Queries):
    """A deletion is requested once, removed from the store, and done when no file has it any more. A quarantined record
    is claimed before it is sent again and ended after it: two operators cannot both send it."""

    def request_deletion(
        self, deletion_id: str, selector: Mapping[str, Any], *, actor: str, reason: str
    ) -> DeletionRow:
        with self.database.write() as session:
            row = session.get(DeletionRow, deletion_id)
            if row is None:
                row = DeletionRow(id=deletion_id, selector=dict(selector), actor=actor, reason=reason)
                session.add(row)
                note(session, actor, "delete", _subject(deletion_id), {"reason": reason, "selector": dict(selector)})
                session.flush()
            return row

    def deletion_removed(
        self, deletion_id: str, *, samples: int, refusals: int, adapters: Mapping[str, Any], store_version: int
    ) -> None:
        """Record that no reader finds it from this store version on. Call it again with new totals if more was
        found."""
        with self.database.write() as session:
            row = session.get(DeletionRow, deletion_id, with_for_update=True)
            if row is None or row.state == "done":
                return
            row.state, row.samples, row.refusals, row.adapters = "removed", samples, refusals, dict(adapters)
            row.removed_version, row.version, row.removed_at = store_version, None, row.removed_at or utc_now()

    def deletion_reopened(self, deletion_id: str) -> None:
        """Record that more of it is about to be removed, so earlier rewriting does not count."""
        with self.database.write() as session:
            mine = update(DeletionRow).where(DeletionRow.id == deletion_id, DeletionRow.state == "removed")
            session.execute(mine.values(version=None))

    def deletions_rewritten(self, ids: Sequence[str], version: int) -> None:
        """Record that no data file has them from this store version on: they are done when older versions are
        removed."""
        with self.database.write() as session:
            mine = update(DeletionRow).where(DeletionRow.id.in_(ids), DeletionRow.state == "removed")
            session.execute(mine.where(DeletionRow.version.is_(None)).values(version=version))

    def deletion_held(self, deletion_id: str, remains: str, until: datetime | None) -> None:
        """Record that only the bucket still has it, and what remains; callable again."""
        with self.database.write() as session:
            row = session.get(DeletionRow, deletion_id, with_for_update=True)
            if row is None or row.state == "done":
                return
            row.state, row.held_at = "held", row.held_at or utc_now()
            row.remains, row.remains_until = remains, until

    def deletion_done(self, deletion_id: str, remains: str | None = None) -> None:
        """Record that its bytes are deleted, with an event and an audit row. ``remains``: why it is unknown whether the
        object store keeps some of it."""
        with self.database.write() as session:
            row = session.get(DeletionRow, deletion_id, with_for_update=True)
            if row is None or row.state == "done":
                return
            row.state, row.done_at, row.remains, row.remains_until = "done", utc_now(), remains, None
            detail = {
                "selector": row.selector, "samples": row.samples, "refusals": row.refusals, "adapters": row.adapters,
                "actor": row.actor, "reason": row.reason, "remains": remains,
            }  # fmt: skip
            note(session, "maintain", "deleted", _subject(deletion_id), detail)
            add_event(session, "ratchet.deletion.v1", _event_id(deletion_id), _subject(deletion_id), detail)

    def list_deletions_in(self, update_id: str, store_version: int) -> list[DeletionRow]:
        """The deletions that an update, pinned to a store version, is the first to be trained without. Each is listed
        with one update; those carried out after the version are left for the next one."""
        with self.database.write() as session:
            mine = update(DeletionRow).where(DeletionRow.update_id.is_(None), DeletionRow.state != "requested")
            session.execute(mine.where(DeletionRow.removed_version <= store_version).values(update_id=update_id))
            query = select(DeletionRow).where(DeletionRow.update_id == update_id).order_by(DeletionRow.requested_at)
            return list(session.scalars(query))

    def deletion(self, deletion_id: str) -> DeletionRow | None:
        return self._get(DeletionRow, deletion_id)

    def deletions(
        self, limit: int = 100, states: Sequence[DeletionState] = (), *, oldest_first: bool = False
    ) -> list[DeletionRow]:
        """The newest deletions, newest first (or the oldest, oldest first), optionally in some states."""
        time = DeletionRow.requested_at
        query = select(DeletionRow).order_by(time if oldest_first else time.desc(), DeletionRow.id).limit(limit)
        if states:
            query = query.where(DeletionRow.state.in_(states))
        return self._all(query)

    def deletion_ids(self, prefix: str) -> set[str]:
        return set(self._all(select(DeletionRow.id).where(DeletionRow.id.startswith(prefix, autoescape=True))))

    def count_deletions(self, prefix: str = "", states: Sequence[DeletionState] = ()) -> int:
        query = select(func.count()).select_from(DeletionRow)
        if prefix:
            query = query.where(DeletionRow.id.startswith(prefix, autoescape=True))
        if states:
            query = query.where(DeletionRow.state.in_(states))
        return self._first(query) or 0

    def oldest_deletion(self) -> DeletionRow | None:
        """The longest-waiting deletion that is not done, if any. Deletions locked in the bucket until a known time are
        left out: an operator cannot help them."""
        until = DeletionRow.remains_until
        waiting = select(DeletionRow).where(DeletionRow.state != "done", or_(until.is_(None), until <= utc_now()))
        return self._first(waiting.order_by(DeletionRow.requested_at))

    def begin_resubmission(self, place: str, *, actor: str, reason: str, force: bool = False) -> ResubmissionRow:
        """Claim the right to resubmit the record quarantined at ``place`` (``topic:partition:offset``). Raises
        AlreadyResubmitted if it was claimed before, even by a process that died before sending; ``force`` claims it
        again."""
        try:
            with self.database.write() as session:
                row = session.get(ResubmissionRow, place, with_for_update=True)
                if row is None:
                    row = ResubmissionRow(place=place, state="sending", times=0, actor=actor, reason=reason)
                    session.add(row)
                elif row.state != "failed" and not force:
                    raise _already(row)
                row.state, row.actor, row.reason = "sending", actor, reason
                row.times, row.updated_at = row.times + 1, utc_now()
                note(session, actor, "resubmit", _record(place), {"reason": reason, "times": row.times})
                session.flush()
                return row
        except IntegrityError:  # two claimed at once with no row to lock: the other one won
            raise _already(self.resubmissions([place])[place]) from None

    def end_resubmission(self, place: str, error: str | None = None) -> None:
        """Record that it was sent, or with ``error`` that it was not and may be tried again. Raises LedgerError without
        a claim."""
        with self.database.write() as session:
            row = session.get(ResubmissionRow, place, with_for_update=True)
            if row is None:
                raise LedgerError(f"record {place} was never claimed.", "Begin the re-submission first.")
            row.state, row.updated_at = "sent" if error is None else "failed", utc_now()
            if error is not None:
                note(session, row.actor, "resubmit failed", _record(place), {"error": error[:1000]})

    def resubmissions(self, places: Sequence[str]) -> dict[str, ResubmissionRow]:
        query = select(ResubmissionRow).where(ResubmissionRow.place.in_(places))
        return {row.place: row for row in self._all(query)}


def _subject(deletion_id: str) -> str:
    return f"deletion {deletion_id}"[:200]


def _event_id(deletion_id: str) -> str:
    """Event ID; long ones, from tombstones in topics with long names, are cut and get a digest."""
    name = f"deletion-{deletion_id}"
    return name if len(name) <= 200 else f"{name[:180]}-{digest12(name.encode())}"


def _record(place: str) -> str:
    return f"record {place}"[:200]


def _already(row: ResubmissionRow) -> AlreadyResubmitted:
    how = "is being sent" if row.state == "sending" else "was sent"
    return AlreadyResubmitted(
        f"record {row.place} {how} again by {row.actor} (at {row.updated_at:%Y-%m-%d %H:%M:%S} UTC: {row.reason}).",
        "Send it once more with `force` if you are sure.",
    )
