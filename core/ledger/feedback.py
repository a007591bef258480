"""Queries of feedback: what callers say of answers. Rows are only added, and removed when they are old; each is told by
an event of the same transaction."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Final, cast

from sqlalchemy import CursorResult, delete, func, select

from core.errors import FeedbackRefused
from core.ledger.database import Queries, insert_new
from core.ledger.events import EVENT_TYPES, add_event
from core.ledger.rows import FeedbackRow, FeedbackVerdict, utc_now

PER_DAY: Final = 1000
"""Of one caller, so that none fills the ledger."""


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

    def feedback_counts(self) -> list[dict[str, Any]]:
        """Rows with ``release``, ``route``, ``verdict``, ``count`` and ``callers``, the newest releases first."""
        by = (FeedbackRow.release, FeedbackRow.route, FeedbackRow.verdict)
        counts = (func.count().label("count"), func.count(FeedbackRow.caller.distinct()).label("callers"))
        query = select(*by, *counts).group_by(*by).order_by(FeedbackRow.release.desc(), *by[1:])
        with self.database.read() as session:
            return [dict(row) for row in session.execute(query).mappings()]

    def prune_feedback(self, before: datetime) -> int:
        """Remove feedback from before a time. Returns the number of rows."""
        with self.database.write() as session:
            result = session.execute(delete(FeedbackRow).where(FeedbackRow.created_at < before))
            return int(cast(CursorResult[Any], result).rowcount)


def _same(known: FeedbackRow, row: FeedbackRow) -> FeedbackRow:
    if (known.verdict, known.detail) != (row.verdict, row.detail):
        raise FeedbackRefused(f"you said {known.verdict!r} of this answer at {known.created_at:%H:%M} UTC.")
    return known
