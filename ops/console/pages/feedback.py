"""The review of corrections: the oldest that waits is shown large, and the next one after each decision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Form
from fastapi.responses import Response

from core.errors import LedgerError
from core.ledger.feedback import WAITING
from core.ledger.rows import FeedbackRow
from ops.console.pages.pictures import drawn
from ops.console.request_context import ErrorPage, Operator, Reader, RequestContext

router = APIRouter()
THUMBNAILS: Final = 48
"""Shown at most, around the large one."""
ENLARGED: Final = 640
"""Pixels of the large picture's longer side, at most."""
REASON: Final = "reviewed in the console"
HEADINGS: Final[Mapping[str, str]] = {
    "correct": "Corrected by a caller",
    "wrong": "Reported as wrong",
    "audit": "Chosen at random",
}


@router.get("/feedback")
def queue(context: Reader) -> Response:
    return _shown(context)


@router.get("/feedback/{feedback_id}")
def one(context: Reader, feedback_id: str) -> Response:
    return _shown(context, _row(context, feedback_id))


@router.get("/feedback/{feedback_id}/picture")
def picture(context: Reader, feedback_id: str, large: bool = False) -> Response:
    row = context.data.ledger.correction(feedback_id)
    if row is None or row.image is None:
        return drawn(None)
    return drawn(context.data.draw(row.image, ENLARGED if large else 96, enlarge=large))


@router.post("/feedback/{feedback_id}")
def decide(
    context: Operator,
    feedback_id: str,
    decision: Annotated[Literal["accept", "dismiss"], Form()],
    label: Annotated[str, Form(max_length=1000)] = "",
    text: Annotated[str, Form(max_length=10_000)] = "",
    reason: Annotated[str, Form(max_length=1000)] = "",
) -> Response:
    assert context.principal is not None
    row = _row(context, feedback_id)
    typed = {name: _meant(value, said) for (name, said), value in zip(_said(row).items(), (label, text), strict=True)}
    reason = reason.strip() or REASON
    ledger, accept, actor = context.data.ledger, decision == "accept", context.principal.actor()
    try:
        ledger.review_correction(row.id, accept, actor=actor, reason=reason, **(typed if accept else {}))
    except LedgerError as error:
        if (now := _row(context, feedback_id)).state != "waiting":
            return _shown(context, now, status=409)
        notice = ("bad", "Nothing was changed", error.message, error.fix)
        return _shown(context, row, notice, typed={**typed, "reason": reason}, status=422)
    done = f"Accepted as “{typed['label'] or typed['text']}”" if accept else "Dismissed"
    return _shown(context, row, ("good", done))


def _shown(
    context: RequestContext, at: FeedbackRow | None = None, notice: tuple[str, ...] | None = None, *,
    typed: Mapping[str, str] | None = None, status: int = 200,
) -> Response:  # fmt: skip
    """The queue at a correction, or at the next one if ``at`` was decided; then also by whom, unless there is a
    ``notice``. ``typed``: what an operator filled in, to be corrected."""
    rows = context.data.ledger.corrections("waiting", WAITING)
    later = [index for index, row in enumerate(rows) if at and (row.created_at, row.id) >= (at.created_at, at.id)]
    place = later[0] if later else 0
    row = rows[place] if rows else None
    first = max(0, min(place - THUMBNAILS // 2, len(rows) - THUMBNAILS))
    if at and at.state != "waiting" and notice is None:
        notice = _decided(context, at)
    facts: dict[str, Any] = {
        "row": row, "rows": rows, "place": place, "thumbnails": rows[first : first + THUMBNAILS], "first": first,
        "notice": notice, "wrong": typed is not None, "heading": HEADINGS.get(row.verdict, row.verdict) if row else "",
        "typed": typed or {**(_said(row) if row else {}), "reason": REASON},
    }  # fmt: skip
    if context.partial:
        return context.part("review.html", status, **facts)
    return context.page("feedback.html", "Review", status, **facts)


def _row(context: RequestContext, feedback_id: str) -> FeedbackRow:
    row = context.data.ledger.correction(feedback_id)
    if row is None:
        raise ErrorPage(404, "There is no such correction", "", "See the queue.")
    return row


def _said(row: FeedbackRow) -> dict[str, str]:
    """What an operator starts from: what the caller said, or what was answered."""
    detail = row.detail
    return {"label": detail.get("label") or detail.get("answered") or "", "text": detail.get("text", "")}


def _meant(typed: str, said: str) -> str:
    """A field's value; unedited if only white space differs, which browsers change by themselves."""
    return said if typed.split() == said.split() else typed.strip().replace("\r\n", "\n")


def _decided(context: RequestContext, row: FeedbackRow) -> tuple[str, ...]:
    reviews = context.data.ledger.audit_rows(1, subject=f"feedback {row.id}")
    who = f"{reviews[0].actor}: “{reviews[0].detail['reason']}”" if reviews else ""
    return "open", f"Another person was faster: it is {row.state}", who
