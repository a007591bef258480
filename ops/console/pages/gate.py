"""Verdicts of the gate with their plots, and the update that is being judged."""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, Response
from markupsafe import Markup

from core.errors import LedgerError, RatchetError
from ops.console.pages.budget import update_summaries
from ops.console.pages.pictures import SAMPLE
from ops.console.public import without_samples
from ops.console.request_context import ErrorPage, Reader, RequestContext
from updater.gate.report import HTML_NAME, JSON_NAME, render_body, samples_of, with_samples

router = APIRouter()
NO_REPORT = "It may be written in a moment; those of what was never released go after a year."
UPDATE = re.compile(r"[A-Za-z0-9._-]{1,64}")
REPORT_POLICY = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
"""The stored page is shown as written, in its own origin (sandbox) and without scripts."""


@router.get("/gate")
def verdicts(context: Reader) -> Response:
    return context.page("gate.html", "Gate", **_facts(context))


@router.get("/gate/now")
def now(context: Reader) -> Response:
    return context.part("gate_now.html", **_facts(context))


@router.get("/gate/{update_id}")
def verdict(context: Reader, update_id: str) -> Response:
    try:
        update = context.data.ledger.update(_checked(update_id))
    except LedgerError:
        raise ErrorPage(404, "There is no such update", "", "See the list of verdicts.") from None
    outcome = context.data.ledger.verdict_of(update_id)
    report = context.data.report_data(update_id) if outcome is not None else None
    if report is not None and context.public and not context.data.settings.console.public_samples:
        report = without_samples(report)
    elif report is not None:
        samples = context.data.samples({name for name in samples_of(report) if SAMPLE.fullmatch(name)})
        report = with_samples(report, samples, "/samples/{}.png?size=96")
    body = Markup(render_body(report)) if report is not None else None  # noqa: S704  (escaped by its own template)
    return context.page("verdict.html", f"Verdict on {update_id}", update=update, verdict=outcome, body=body)


@router.get("/gate/{update_id}/report")
def report_page(context: Reader, update_id: str) -> Response:
    return HTMLResponse(_stored(context, update_id, HTML_NAME), headers={"content-security-policy": REPORT_POLICY})


@router.get("/gate/{update_id}/data")
def report_data(context: Reader, update_id: str) -> Response:
    name = f'attachment; filename="{_checked(update_id)}.json"'
    return Response(
        _stored(context, update_id, JSON_NAME), media_type="application/json", headers={"content-disposition": name}
    )


def _stored(context: RequestContext, update_id: str, name: str) -> bytes:
    if context.public:
        raise ErrorPage(404, "There is no such page", "Stored reports are not public.", "See the verdict.")
    try:
        return context.data.report(_checked(update_id), name)
    except RatchetError as error:
        raise ErrorPage(404, "This report is not there", error.message, NO_REPORT) from None


def _checked(update_id: str) -> str:
    if not UPDATE.fullmatch(update_id):
        raise ErrorPage(404, "There is no such update", "", "See the list of verdicts.")
    return update_id


def _facts(context: RequestContext) -> dict[str, Any]:
    summaries = update_summaries(context.data.ledger, limit=40)
    current = next((summary for summary in summaries if summary.running), None)
    return {"updates": summaries, "current": current, "learning": context.data.learning()}
