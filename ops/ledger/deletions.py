"""Verbs of deletions: what is to be gone, how far that is, and which adapters have learned from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import func, select, update

from ops.ledger import tables as t
from ops.ledger.audit import note
from ops.ledger.database import Database, as_row
from ops.ledger.events import add_event
from ops.ledger.rows import DeletionRow, DeletionState


class DeletionVerbs:
    """A deletion is requested once, removed from the store, and done when no file holds it any more."""

    database: Database

    def request_deletion(
        self, deletion_id: str, selector: Mapping[str, Any], *, actor: str, reason: str
    ) -> DeletionRow:
        """Record a wish; the same id again returns what is there."""
        with self.database.write() as session:
            row = session.get(t.Deletion, deletion_id)
            if row is None:
                row = t.Deletion(id=deletion_id, selector=dict(selector), actor=actor, reason=reason)
                session.add(row)
                note(session, actor, "delete", _subject(deletion_id), {"reason": reason, "selector": dict(selector)})
                session.flush()
            return as_row(DeletionRow, row)

    def deletion_removed(self, deletion_id: str, *, samples: int, refusals: int, adapters: Mapping[str, Any]) -> None:
        """No reader of the store finds it any more. Once more, after a crash: the numbers add up."""
        with self.database.write() as session:
            row = session.get(t.Deletion, deletion_id, with_for_update=True)
            if row is None or row.state == "done":
                return
            row.state = "removed"
            row.samples, row.refusals = row.samples + samples, row.refusals + refusals
            row.adapters, row.removed_at = dict(adapters), row.removed_at or t.utc_now()

    def deletions_rewritten(self, ids: Sequence[str], version: int) -> None:
        """From this version of the store on, no data file has them: when older versions are gone, they are done."""
        with self.database.write() as session:
            mine = update(t.Deletion).where(t.Deletion.id.in_(ids), t.Deletion.state == "removed")
            session.execute(mine.where(t.Deletion.version.is_(None)).values(version=version))

    def deletion_done(self, deletion_id: str) -> None:
        """Its bytes are gone, too: that is told to others, and an audit row is the receipt."""
        with self.database.write() as session:
            row = session.get(t.Deletion, deletion_id, with_for_update=True)
            if row is None or row.state == "done":
                return
            row.state, row.done_at = "done", t.utc_now()
            detail = {
                "selector": row.selector, "samples": row.samples, "refusals": row.refusals, "adapters": row.adapters,
                "actor": row.actor, "reason": row.reason,
            }  # fmt: skip
            note(session, "maintain", "deleted", _subject(deletion_id), detail)
            add_event(session, "ratchet.deletion.v1", f"deletion-{deletion_id}"[:200], _subject(deletion_id), detail)

    def list_deletions_in(self, update_id: str) -> list[DeletionRow]:
        """The deletions that an update is the first to be trained without. They are listed once."""
        with self.database.write() as session:
            mine = update(t.Deletion).where(t.Deletion.update_id.is_(None), t.Deletion.state != "requested")
            session.execute(mine.values(update_id=update_id))
            query = select(t.Deletion).where(t.Deletion.update_id == update_id).order_by(t.Deletion.requested_at)
            return [as_row(DeletionRow, row) for row in session.scalars(query)]

    def deletion(self, deletion_id: str) -> DeletionRow | None:
        """One deletion, or None."""
        with self.database.read() as session:
            row = session.get(t.Deletion, deletion_id)
            return None if row is None else as_row(DeletionRow, row)

    def deletions(self, limit: int = 100, states: Sequence[DeletionState] = ()) -> list[DeletionRow]:
        """The newest deletions, newest first; only those in some states."""
        query = select(t.Deletion).order_by(t.Deletion.requested_at.desc(), t.Deletion.id).limit(limit)
        if states:
            query = query.where(t.Deletion.state.in_(states))
        with self.database.read() as session:
            return [as_row(DeletionRow, row) for row in session.scalars(query)]

    def count_deletions(self, prefix: str) -> int:
        """How many have an id that begins so."""
        query = select(func.count()).select_from(t.Deletion).where(t.Deletion.id.startswith(prefix, autoescape=True))
        with self.database.read() as session:
            return int(session.scalar(query) or 0)


def _subject(deletion_id: str) -> str:
    return f"deletion {deletion_id}"[:200]
