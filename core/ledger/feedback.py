"""Queries of feedback: reports of callers on answers. Each has an event of the same transaction; only the review of a
correction changes a row, and old ones are removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, cast

from sqlalchemy import CursorResult, case, delete, func, select, true, update
from sqlalchemy.orm import Session, undefer

from core.errors import FeedbackRefused, LedgerError
from core.ledger.database import Queries, insert_new
from core.ledger.events import EVENT_TYPES, add_event, note
from core.ledger.rows import CorrectionState, FeedbackRow, FeedbackVerdict, utc_now

PER_DAY: Final = 1000
"""Of one caller, so that none fills the ledger."""
WAITING: Final = 500
"""Corrections with images that wait at most, a fifth of them of one caller."""


@dataclass(frozen=True, slots=True)
class CallerReports:
    caller: str
    wrong: int
    """Wrong, or corrected."""
    of: int
    """Right or wrong."""


class FeedbackQueries(Queries):
    def record_feedback(self, row: FeedbackRow) -> tuple[FeedbackRow, bool]:
        """Record feedback once. Returns the recorded row, and False if there was one of this caller on this answer
        already: that row. Raises FeedbackRefused if that one says something else, or the caller has given
        :data:`PER_DAY` within a day."""
        with self.database.write() as session:
            if (known := session.get(FeedbackRow, row.id)) is not None:
                return _same(known, row), False
            since = select(func.count()).where(
                FeedbackRow.caller == row.caller, FeedbackRow.created_at > utc_now() - timedelta(days=1)
            )
            if (session.scalar(since) or 0) >= PER_DAY:
                raise FeedbackRefused(
                    f"{row.caller} has given feedback on {PER_DAY} answers within a day.", too_many=True
                )
            if row.state == "waiting":
                _check_room(session, row.caller)
            values = {column.key: getattr(row, column.key) for column in FeedbackRow.__mapper__.column_attrs}
            if not insert_new(session, FeedbackRow.id, values):  # said by another request at the same time
                return _same(session.get_one(FeedbackRow, row.id), row), False
            data = {
                "caller": row.caller, "release": row.release, "route": row.route, "input": row.input,
                "answered_at": row.answered_at.isoformat(), "verdict": row.verdict, **row.detail,
            }  # fmt: skip
            add_event(session, EVENT_TYPES["feedback"], f"feedback-{row.id}", f"release {row.release}", data)
            return row, True

    def feedback(
        self, limit: int = 50, *, verdict: FeedbackVerdict | None = None, release: int | None = None
    ) -> list[FeedbackRow]:
        """The newest feedback, newest first."""
        query = select(FeedbackRow).order_by(FeedbackRow.created_at.desc(), FeedbackRow.id).limit(limit)
        if verdict is not None:
            query = query.where(FeedbackRow.verdict == verdict)
        return self._all(query if release is None else query.where(FeedbackRow.release == release))

    def corrections(self, state: CorrectionState, limit: int = 50, *, images: bool = False) -> list[FeedbackRow]:
        """Corrections in a state, oldest first; ``images``: with their images."""
        query = select(FeedbackRow).where(FeedbackRow.state == state).order_by(FeedbackRow.created_at).limit(limit)
        return self._all(query.options(undefer(FeedbackRow.image)) if images else query)

    def review_correction(self, prefix: str, accept: bool, *, actor: str, reason: str) -> FeedbackRow:
        """Accept a waiting correction, or dismiss it and forget its image. ``prefix``: the first 8 digits of its ID or
        more. Raises LedgerError if none waits, or several do."""
        with self.database.write() as session:
            waiting = select(FeedbackRow).where(FeedbackRow.state == "waiting", FeedbackRow.id.startswith(prefix))
            rows = session.scalars(waiting.limit(2)).all()
            if len(prefix) < 8 or len(rows) != 1:
                found = "more than one correction waits" if len(rows) > 1 else "no correction waits"
                raise LedgerError(
                    f"{found} for a review with the ID {prefix!r}.",
                    "`ratchet feedback list --waiting` lists them; give 8 digits or more.",
                )
            (row,) = rows
            row.state, row.outcome = ("accepted", None) if accept else ("dismissed", reason[:300])
            if not accept:
                row.image = None
            action = "accept correction" if accept else "dismiss correction"
            note(session, actor, action, f"feedback {row.id}", {"reason": reason})
            session.flush()
            return row

    def settle_correction(self, feedback_id: str, state: CorrectionState, outcome: str) -> None:
        """Record what became of an accepted correction, and forget its image."""
        settled = update(FeedbackRow).where(FeedbackRow.id == feedback_id, FeedbackRow.state == "accepted")
        with self.database.write() as session:
            session.execute(settled.values(state=state, outcome=outcome[:300], image=None))

    def feedback_counts(self) -> list[dict[str, Any]]:
        """Rows with ``release``, ``route``, ``verdict``, ``count`` and ``callers``, the newest releases first."""
        by = (FeedbackRow.release, FeedbackRow.route, FeedbackRow.verdict)
        counts = (func.count().label("count"), func.count(FeedbackRow.caller.distinct()).label("callers"))
        query = select(*by, *counts).group_by(*by).order_by(FeedbackRow.release.desc(), *by[1:])
        with self.database.read() as session:
            return [dict(row) for row in session.execute(query).mappings()]

    def feedback_by_caller(
        self, release: int, routes: Sequence[str], before: datetime | None = None
    ) -> list[CallerReports]:
        """Reports of a release's answers on these routes, recorded ``before`` a time."""
        wrong = func.sum(case((FeedbackRow.verdict == "right", 0), else_=1))
        query = select(FeedbackRow.caller, wrong, func.count()).where(
            FeedbackRow.release == release, FeedbackRow.route.in_(routes), FeedbackRow.verdict != "chosen"
        )
        if before is not None:
            query = query.where(FeedbackRow.created_at < before)
        with self.database.read() as session:
            return [CallerReports(*row) for row in session.execute(query.group_by(FeedbackRow.caller))]

    def prune_feedback(self, before: datetime) -> int:
        """Remove feedback from before a time. Returns the number of rows."""
        with self.database.write() as session:
            result = session.execute(delete(FeedbackRow).where(FeedbackRow.created_at < before))
            return int(cast(CursorResult[Any], result).rowcount)


def _check_room(session: Session, caller: str) -> None:
    for who, condition, most in (
        (f"{caller}'s", FeedbackRow.caller == caller, WAITING // 5), ("all", true(), WAITING),
    ):  # fmt: skip
        waiting = select(func.count()).where(FeedbackRow.state.in_(("waiting", "accepted")), condition)
        if (session.scalar(waiting) or 0) >= most:
            raise FeedbackRefused(f"{most} of {who} corrections wait for a review already.", too_many=True)


def _same(known: FeedbackRow, row: FeedbackRow) -> FeedbackRow:
    if (known.verdict, known.detail) != (row.verdict, row.detail):
        raise FeedbackRefused(f"you said {known.verdict!r} of this answer at {known.created_at:%H:%M} UTC.")
    return known
