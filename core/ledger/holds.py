"""Queries of holds: while one is open, no update goes live."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.errors import Held, LedgerError
from core.ledger import tables as t
from core.ledger.database import Database, as_row, write_once
from core.ledger.events import note
from core.ledger.rows import SYSTEM_ACTORS, HoldRow


class HoldQueries:
    """What operators write to stop and resume updates."""

    database: Database

    def hold(self, actor: str, reason: str) -> HoldRow:
        """Let update proposals wait until :meth:`resume`. A second hold keeps the first."""

        def write(session: Session, _repeated: bool) -> HoldRow:
            return as_row(HoldRow, open_hold(session) or add_hold(session, actor, reason))

        return write_once(self.database, write, "the hold")

    def resume(self, actor: str, reason: str) -> None:
        """End a hold. Raises LedgerError when nothing is held."""

        def write(session: Session, repeated: bool) -> None:
            row = open_hold(session)
            if row is None and not repeated:
                raise LedgerError("updates are not on hold.", "There is nothing to resume.")
            if row is not None:
                row.resumed_at = t.utc_now()
                note(session, actor, "resume", "updates", {"reason": reason})

        write_once(self.database, write, "the end of the hold")

    def held(self) -> HoldRow | None:
        """The open hold, if there is one."""
        with self.database.read() as session:
            row = open_hold(session)
            return None if row is None else as_row(HoldRow, row)


def open_hold(session: Session) -> t.Hold | None:
    """The hold that nobody has ended."""
    return session.scalars(select(t.Hold).where(t.Hold.resumed_at.is_(None)).order_by(t.Hold.id)).first()


def add_hold(session: Session, actor: str, reason: str) -> t.Hold:
    """Open a hold, with its audit row."""
    row = t.Hold(actor=actor, reason=reason)
    session.add(row)
    note(session, actor, "hold", "updates", {"reason": reason})
    session.flush()
    return row


def check_hold(session: Session, proposal: t.Proposal, actor: str) -> None:
    """Refuse what would go live by itself while a hold is open: updates, and promotions that no operator asked for.

    Raises:
        Held: it has to wait.
    """
    by_itself = proposal.kind == "update" or (proposal.kind == "promotion" and actor in SYSTEM_ACTORS)
    held = open_hold(session) if by_itself else None
    if held is not None:
        raise Held(
            f"proposal {proposal.id} waits: {held.actor} holds updates ({held.reason}).",
            "`ratchet releases resume` lets it go on.",
        )
