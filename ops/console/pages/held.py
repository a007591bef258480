"""Samples that are held until an operator accepts them, and sources that are not trusted."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Form, Query
from fastapi.responses import Response

from core.errors import LedgerError
from ops.console.pages.feedback import REASON
from ops.console.pages.pictures import SAMPLE
from ops.console.request_context import Operator, Reader, RequestContext
from ops.held_samples import WORDS, accept_held, held_counts, held_samples
from streams.store.sample_queries import OTHERS

router = APIRouter()
SHOWN: Final = 48
COUNT_SECONDS: Final = 10.0
"""Minimum interval between scans of the store, for all viewers together."""
Why = Annotated[str, Form(max_length=1000)]
OfSource = Annotated[str, Query(max_length=256)]
HeldFor = Annotated[str, Query(max_length=40)]
Notice = tuple[str, ...]


@router.get("/held")
def held(context: Reader, source: OfSource = "", reason: HeldFor = "") -> Response:
    return _shown(context, source, reason)


@router.post("/held")
def accept(
    context: Operator,
    source: OfSource = "",
    reason: HeldFor = "",
    ids: Annotated[list[str] | None, Form(max_length=SHOWN)] = None,
    only: Annotated[str, Form(max_length=64)] = "",
    why: Why = "",
) -> Response:
    """Accept the chosen samples; with ``only`` that one. ``source``, ``reason``: what the list is narrowed to."""
    assert context.principal is not None
    chosen = [each for each in dict.fromkeys([only] if only else ids or ()) if SAMPLE.fullmatch(each)]
    if not chosen:
        return _shown(context, source, reason, ("bad", "Choose samples first"), 422)
    data, actor = context.data, context.principal.actor()
    count = accept_held(data.store, data.ledger, chosen, actor=actor, reason=why.strip() or REASON)
    done = f"{count} sample{' is' if count == 1 else 's are'} accepted"
    if left := len(chosen) - count:
        late = ("open", f"{done}, {left} not", "Another person was faster, or they were deleted.")
        return _shown(context, source, reason, late)
    return _shown(context, source, reason, ("good", done))


@router.post("/held/sources")
def decide(
    context: Operator,
    name: Annotated[str, Form(max_length=256)] = "",
    decision: Annotated[Literal["trust", "distrust"], Form()] = "distrust",
    why: Why = "",
    source: OfSource = "",
    reason: HeldFor = "",
) -> Response:
    """Trust a source, or do so no more."""
    assert context.principal is not None
    if not name.strip() or not why.strip():
        missing = ("bad", "Nothing was changed", "Name the source, and say why: it is kept in the audit log.")
        return _shown(context, source, reason, missing, 422)
    ledger, actor = context.data.ledger, context.principal.actor()
    if decision == "distrust":
        row = ledger.distrust(name, actor=actor, reason=why.strip())
        return _shown(context, source, reason, ("good", f"{name} is distrusted", f"By {row.actor}: {row.reason}"))
    try:
        ledger.trust(name, actor=actor, reason=why.strip())
    except LedgerError as error:
        return _shown(context, source, reason, ("bad", "Nothing was changed", error.message), 409)
    return _shown(context, source, reason, ("good", f"{name} is learned from again"))


def _shown(
    context: RequestContext, source: str, reason: str, notice: Notice | None = None, status: int = 200
) -> Response:
    """The list after an action, with its ``notice``, or as it is."""
    data, chosen = context.data, reason if reason in WORDS else ""
    counts = data.cached("held", lambda: held_counts(data.store), seconds=COUNT_SECONDS if notice is None else 0.0)
    facts: dict[str, Any] = {
        "rows": held_samples(data.store, SHOWN, source or None, chosen or None), "counts": counts, "most": SHOWN,
        "words": WORDS, "source": source, "reason": chosen, "notice": notice,
        "distrusted": data.ledger.distrusted(), "why": REASON,
        "others": OTHERS,
    }  # fmt: skip
    if context.partial:
        return context.part("held_now.html", status, **facts)
    return context.page("held.html", "Held", status, **facts)
