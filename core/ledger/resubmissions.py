"""Queries of re-submission: a refused record is sent again once, unless somebody insists."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from core.errors import AlreadyResubmitted, LedgerError
from core.ledger import tables as t
from core.ledger.database import Database, as_row
from core.ledger.events import note
from core.ledger.rows import ResubmissionRow


class ResubmissionQueries:
    """Claimed before the record is sent and ended after it: two operators cannot both send it."""

    database: Database

    def begin_resubmission(self, place: str, *, actor: str, reason: str, force: bool = False) -> ResubmissionRow:
        """Claim the right to send a refused record again.

        Args:
            place: ``topic:partition:offset`` where the record was refused.
            force: also when it was sent before, or when a process died between the claim and the sending.

        Raises:
            AlreadyResubmitted: it was, and ``force`` is not set.
        """
        try:
            with self.database.write() as session:
                row = session.get(t.Resubmission, place, with_for_update=True)
                if row is None:
                    row = t.Resubmission(place=place, times=0)
                    session.add(row)
                elif row.state != "failed" and not force:
                    raise _already(as_row(ResubmissionRow, row))
                row.state, row.actor, row.reason = "sending", actor, reason
                row.times, row.updated_at = row.times + 1, t.utc_now()
                note(session, actor, "resubmit", _subject(place), {"reason": reason, "times": row.times})
                session.flush()
                return as_row(ResubmissionRow, row)
        except IntegrityError:  # two claimed at once where there was no row to lock: the other one won
            raise _already(self.resubmissions([place])[place]) from None

    def end_resubmission(self, place: str, error: str | None = None) -> None:
        """The record was sent, or (``error``) was not and may be tried again. Raises LedgerError without a claim."""
        with self.database.write() as session:
            row = session.get(t.Resubmission, place, with_for_update=True)
            if row is None:
                raise LedgerError(f"record {place} was never claimed.", "Begin the re-submission first.")
            row.state, row.updated_at = "sent" if error is None else "failed", t.utc_now()
            if error is not None:
                note(session, row.actor, "resubmit failed", _subject(place), {"error": error[:1000]})

    def resubmissions(self, places: Sequence[str]) -> dict[str, ResubmissionRow]:
        """Those of the records that were sent again, by place."""
        query = select(t.Resubmission).where(t.Resubmission.place.in_(places))
        with self.database.read() as session:
            return {row.place: as_row(ResubmissionRow, row) for row in session.scalars(query)}


def _subject(place: str) -> str:
    return f"record {place}"[:200]


def _already(row: ResubmissionRow) -> AlreadyResubmitted:
    how = "is being sent" if row.state == "sending" else "was sent"
    return AlreadyResubmitted(
        f"record {row.place} {how} again by {row.actor} (at {row.updated_at:%Y-%m-%d %H:%M:%S} UTC: {row.reason}).",
        "Send it once more with `force` if you are sure.",
    )
