"""Verdicts of the gate, with their plots; and what is being judged now."""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, Response
from markupsafe import Markup

from ops.console.learning import lessons
from ops.console.pages.pictures import SAMPLE
from ops.console.public import without_samples
from ops.console.visit import Reader, Refused, Visit
from ops.errors import LedgerError, RatchetError
from updater.gate.report import HTML_NAME, JSON_NAME, render_body
from updater.gate.report_samples import samples_of, with_samples

router = APIRouter()
UPDATE = re.compile(r"[A-Za-z0-9._-]{1,64}")
THUMBNAIL = "/samples/{}.png?size=96"
REPORT_POLICY = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
"""The stored page is shown as it was written, in an origin of its own (sandbox) and without any script."""


@router.get("/gate")
def verdicts(at: Reader) -> Response:
    """Every update, and what the gate said of it."""
    return at.page("gate.html", "Gate", **_facts(at))


@router.get("/gate/now")
def now(at: Reader) -> Response:
    """What is trained or judged at this moment, and the list."""
    return at.part("gate_now.html", **_facts(at))


@router.get("/gate/{update_id}")
def verdict(at: Reader, update_id: str) -> Response:
    """One verdict, drawn from its data."""
    try:
        found = at.desk.ledger.update(_checked(update_id))
    except LedgerError:
        raise Refused(404, "There is no such update", "", "See the list of verdicts.") from None
    said = at.desk.ledger.verdict_of(update_id)
    report = at.desk.report_data(update_id) if said is not None else None
    if report is not None and at.public and not at.desk.settings.console.public_samples:
        report = without_samples(report)
    elif report is not None:
        report = with_samples(report, _samples(at, report), THUMBNAIL)
    body = Markup(render_body(report)) if report is not None else None  # noqa: S704  (escaped by its own template)
    return at.page("verdict.html", f"Verdict on {update_id}", update=found, verdict=said, body=body)


@router.get("/gate/{update_id}/report")
def report_page(at: Reader, update_id: str) -> Response:
    """The report as it was stored: a page of its own, to print or to keep."""
    return HTMLResponse(_stored(at, update_id, HTML_NAME), headers={"content-security-policy": REPORT_POLICY})


@router.get("/gate/{update_id}/data")
def report_data(at: Reader, update_id: str) -> Response:
    """The report's numbers."""
    name = f'attachment; filename="{_checked(update_id)}.json"'
    return Response(
        _stored(at, update_id, JSON_NAME), media_type="application/json", headers={"content-disposition": name}
    )


def _samples(at: Visit, report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The samples that a report names and the store still has."""
    return at.desk.samples({name for name in samples_of(report) if SAMPLE.fullmatch(name)})


def _stored(at: Visit, update_id: str, name: str) -> bytes:
    if at.public:
        raise Refused(404, "There is no such page", "Stored reports are not public.", "See the verdict.")
    try:
        return at.desk.report(_checked(update_id), name)
    except RatchetError as error:
        raise Refused(404, "This report is not there", error.message, "It may be written in a moment.") from None


def _checked(update_id: str) -> str:
    if not UPDATE.fullmatch(update_id):
        raise Refused(404, "There is no such update", "", "See the list of verdicts.")
    return update_id


def _facts(at: Visit) -> dict[str, Any]:
    learned = lessons(at.desk.ledger, limit=40)
    current = next((lesson for lesson in learned if lesson.running), None)
    return {"lessons": learned, "current": current, "learning": at.desk.learning()}
