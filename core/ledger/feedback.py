"""Queries of feedback: reports of callers on answers. Each has an event of the same transaction; only the review of a
correction changes a row, and old ones are removed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, cast

from sqlalchemy import CursorResult, case, delete, func, select, true, update
from sqlalchemy.orm import Session, undefer

from core.errors import FeedbackRefused, LedgerError
from core.ledger.database import Queries, insert_new
from core.ledger.events import EVENT_TYPES, add_event, note
from core.ledger.rows import AUDITOR, CorrectionState, FeedbackRow, FeedbackVerdict, utc_now

PER_DAY: Final = 1000
"""Of one caller, so that none fills the ledger."""
WAITING: Final = 500
"""Answers with images that wait at most, a fifth of them of one caller, half of them random audits."""


@dataclass(frozen=True, slots=True)
class CallerReports:
    caller: str
    wrong: int
    """Wrong, or corrected."""
    of: int
    """Right or wrong."""


class FeedbackQueries(Queries):
    def record_feedback(self, row: FeedbackRow, accept: Collection[str] = ()) -> tuple[FeedbackRow, bool]:
        """Record feedback once, with its event; an audit has none. Returns the recorded row, and False if there was one
        of this caller on this answer already: that row. ``accept``: the setting `feedback.accept`. Raises
        FeedbackRefused if that one says something else, or the caller has given :data:`PER_DAY` within a day."""
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
            if row.state == "waiting" and row.verdict == "correct" and _without_review(session, row, accept):
                row.state = "accepted"
            values = {column.key: getattr(row, column.key) for column in FeedbackRow.__mapper__.column_attrs}
            if not insert_new(session, FeedbackRow.id, values):  # said by another request at the same time
                return _same(session.get_one(FeedbackRow, row.id), row), False
            if row.verdict == "audit":
                return row, True
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
        query = select(FeedbackRow).where(FeedbackRow.state == state).limit(limit)
        query = query.order_by(FeedbackRow.created_at, FeedbackRow.id)
        return self._all(query.options(undefer(FeedbackRow.image)) if images else query)

    def correction(self, feedback_id: str) -> FeedbackRow | None:
        """The feedback with this ID, with its image."""
        with self.database.read() as session:
            return session.get(FeedbackRow, feedback_id, options=[undefer(FeedbackRow.image)])

    def review_correction(
        self, prefix: str, accept: bool, *, actor: str, reason: str, label: str | None = None, text: str | None = None
    ) -> FeedbackRow:
        """Accept a waiting correction, or dismiss it and forget its image. ``prefix``: the first 8 digits of its ID or
        more. ``label``, ``text``: accept these instead of the caller's; an empty one removes the caller's. Raises
        LedgerError if none waits, if several do, or if the accepted one has neither a label nor a text."""
        with self.database.write() as session:
            waiting = select(FeedbackRow).where(FeedbackRow.state == "waiting", FeedbackRow.id.startswith(prefix))
            rows = session.scalars(waiting.limit(2).with_for_update()).all()
            if len(prefix) < 8 or len(rows) != 1:
                found = "more than one correction waits" if len(rows) > 1 else "no correction waits"
                raise LedgerError(
                    f"{found} for a review with the ID {prefix!r}.",
                    "`ratchet feedback list --waiting` lists them; give 8 digits or more.",
                )
            (row,) = rows
            edit = _accept(row, {"label": label, "text": text}) if accept else {}
            row.state, row.outcome = ("accepted", None) if accept else ("dismissed", reason[:300])
            if not accept:
                row.image = None
            action = "accept correction" if accept else "dismiss correction"
            note(session, actor, action, f"feedback {row.id}", {"reason": reason, **edit})
            session.flush()
            return row

    def settle_correction(self, feedback_id: str, state: CorrectionState, outcome: str) -> None:
        """Record what became of an accepted correction, and forget its image."""
        settled = update(FeedbackRow).where(FeedbackRow.id == feedback_id, FeedbackRow.state == "accepted")
        with self.database.write() as session:
            session.execute(settled.values(state=state, outcome=outcome[:300], image=None))

    def feedback_counts(self) -> list[dict[str, Any]]:
        """Rows with ``release``, ``route``, ``verdict``, ``count`` and ``callers``, the newest releases first, without
        audits that nobody has reviewed."""
        by = (FeedbackRow.release, FeedbackRow.route, FeedbackRow.verdict)
        counts = (func.count().label("count"), func.count(FeedbackRow.caller.distinct()).label("callers"))
        reported = select(*by, *counts).where(FeedbackRow.verdict != "audit")
        query = reported.group_by(*by).order_by(FeedbackRow.release.desc(), *by[1:])
        with self.database.read() as session:
            return [dict(row) for row in session.execute(query).mappings()]

    def feedback_by_caller(
        self,
        release: int,
        routes: Sequence[str],
        before: datetime | None = None,
        *,
        since: datetime | None = None,
    ) -> list[CallerReports]:
        """Reports of a release's answers on these routes, recorded ``before`` a time, or at it or later."""
        wrong = func.sum(case((FeedbackRow.verdict == "right", 0), else_=1))
        query = select(FeedbackRow.caller, wrong, func.count()).where(
            FeedbackRow.release == release,
            FeedbackRow.route.in_(routes),
            FeedbackRow.verdict.not_in(("chosen", "audit")),
        )
        if before is not None:
            query = query.where(FeedbackRow.created_at < before)
        if since is not None:
            query = query.where(FeedbackRow.created_at >= since)
        with self.database.read() as session:
            return [CallerReports(*row) for row in session.execute(query.group_by(FeedbackRow.caller))]

    def prune_feedback(self, before: datetime, caller: str | None = None) -> int:
        """Remove feedback from before a time, of one caller or of all. Returns the number of rows."""
        own = true() if caller is None else FeedbackRow.caller == caller
        with self.database.write() as session:
            result = session.execute(delete(FeedbackRow).where(FeedbackRow.created_at < before, own))
            return int(cast(CursorResult[Any], result).rowcount)


def _without_review(session: Session, row: FeedbackRow, accept: Collection[str]) -> bool:
    """Whether a correction is accepted at once. If another caller's is for that, it is accepted, too."""
    same = []
    if "second_caller" in accept:
        other = select(FeedbackRow).where(
            FeedbackRow.state == "waiting",
            FeedbackRow.verdict == "correct",
            FeedbackRow.caller != row.caller,
            FeedbackRow.detail["image_digest"].as_string() == row.detail["image_digest"],
        )
        same = [each for each in session.scalars(other) if _words(each) == _words(row)]
        for each in same:
            each.state = "accepted"
    return bool(same) or "agreement" in accept


def _words(row: FeedbackRow) -> tuple[str, ...]:
    return tuple(str(row.detail.get(name, "")).strip().casefold() for name in ("label", "text"))


def _check_room(session: Session, caller: str) -> None:
    own = WAITING // (2 if caller == AUDITOR else 5)
    for who, condition, most in (
        (f"{caller}'s", FeedbackRow.caller == caller, own), ("all", true(), WAITING),
    ):  # fmt: skip
        waiting = select(func.count()).where(FeedbackRow.state.in_(("waiting", "accepted")), condition)
        if (session.scalar(waiting) or 0) >= most:
            raise FeedbackRefused(f"{most} of {who} corrections wait for a review already.", too_many=True)


def _accept(row: FeedbackRow, typed: Mapping[str, str | None]) -> dict[str, Any]:
    """Apply a reviewer's edit to a row, and judge an audited answer. Returns the edit and what was said before it, for
    the audit log."""
    said = row.detail
    edit = {name: value for name, value in typed.items() if value is not None and value != said.get(name, "")}
    kept = {name: value for name, value in {**said, **edit}.items() if str(value).strip()}
    final = kept.get("label") or kept.get("text")
    if final is None:
        raise LedgerError(
            f"the correction {row.id[:8]} says neither a label nor a text.",
            "Say what is right: `ratchet feedback accept ID --label LABEL`, or --text; or dismiss it.",
        )
    if row.verdict == "audit":
        row.verdict = "right" if final == said.get("answered") else "correct"
    if not edit:
        return {}
    row.detail = {**kept, "said": said}
    return {**edit, "said": said}


def _same(known: FeedbackRow, row: FeedbackRow) -> FeedbackRow:
    if (known.verdict, known.detail.get("said", known.detail)) != (row.verdict, row.detail):
        raise FeedbackRefused(f"you said {known.verdict!r} of this answer at {known.created_at:%H:%M} UTC.")
    return known
