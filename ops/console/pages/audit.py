"""The audit log, and deletions of samples with their receipts."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, Response

from core.ledger import DeletionRow, DeletionState
from ops.console.request_context import ErrorPage, Reader, RequestContext
from streams.store.deletion import as_json

router = APIRouter()
STEP = 100
DELETIONS_STEP = 50
MOST = 2000
ID_CHARS = 300
STATES: dict[DeletionState, str] = {
    "requested": "waits", "removed": "removed", "held": "held", "done": "done",
}  # fmt: skip
MEANING: dict[DeletionState, str] = {
    "requested": "Maintenance has not come to it.",
    "removed": "No reader finds it any more. Files of older versions of the store still hold its bytes.",
    "held": "No file of the sample store holds it any more. The bucket keeps old versions of such files.",
    "done": "No file of the sample store holds it any more.",
}


@router.get("/audit")
def audit(
    context: Reader,
    about: Annotated[str, Query(max_length=200)] = "",
    actor: Annotated[str, Query(max_length=200)] = "",
    limit: Annotated[int, Query(ge=1, le=MOST)] = STEP,
) -> Response:
    rows = context.data.ledger.audit_rows(limit + 1, subject=about.strip() or None, actor=actor.strip() or None)
    more = min(limit + STEP, MOST) if len(rows) > limit < MOST else 0
    return context.page("audit.html", "Audit", rows=rows[:limit], about=about, actor=actor, more=more)


@router.get("/audit/deletions")
def deletions(
    context: Reader,
    state: Annotated[DeletionState | Literal[""], Query()] = "",
    limit: Annotated[int, Query(ge=1, le=MOST)] = DELETIONS_STEP,
) -> Response:
    rows = context.data.ledger.deletions(limit + 1, [state] if state else ())
    more = min(limit + DELETIONS_STEP, MOST) if len(rows) > limit < MOST else 0
    return context.page("deletions.html", "Deletions", rows=rows[:limit], state=state, states=STATES, more=more)


@router.get("/audit/deletions/{deletion_id:path}/receipt")
def receipt(context: Reader, deletion_id: str) -> Response:
    return JSONResponse(as_json(_deletion(context, deletion_id)))


@router.get("/audit/deletions/{deletion_id:path}")
def deletion(context: Reader, deletion_id: str) -> Response:
    row = _deletion(context, deletion_id)
    return context.page(
        "deletion.html", f"Deletion {row.id}"[:120], row=row, receipt=as_json(row), shown=STATES[row.state],
        meaning=MEANING[row.state], subject=f"deletion {row.id}"[:200],
    )  # fmt: skip


def _deletion(context: RequestContext, deletion_id: str) -> DeletionRow:
    row = context.data.ledger.deletion(deletion_id) if len(deletion_id) <= ID_CHARS else None
    if row is None:
        raise ErrorPage(404, "There is no such deletion", "", "See the list of deletions.")
    return row
