"""Quarantined records with reason and place, and resubmitting one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final

from fastapi import APIRouter, Form, Query
from fastapi.responses import Response

from core.errors import AlreadyResubmitted, RatchetError, UnknownRecord
from ops.console.pages.pictures import drawn
from ops.console.request_context import ErrorPage, Operator, Reader, RequestContext
from ratchet_client.records import Reason
from streams.ingest.resubmit import list_quarantine, quarantined, resubmit
from streams.records.codecs import glimpse
from streams.store.sample_queries import OTHERS, quarantine_counts

router = APIRouter()
SHOWN = 48
SOURCES = 30
Why = Annotated[str, Form(max_length=1000)]
WORDS: Final[Mapping[Reason, str]] = {
    "empty": "The record is empty",
    "not_json": "Neither a picture nor JSON",
    "schema": "A field is wrong",
    "headers": "A header is wrong",
    "image_missing": "There is no picture",
    "image_too_large": "The picture has too many bytes",
    "image_too_many_pixels": "The picture has too many pixels",
    "image_too_small": "The picture is too small",
    "image_format": "No picture format that is taken",
    "image_undecodable": "The picture is damaged",
    "text_missing": "There is no text",
    "text_too_long": "The text is too long",
    "uri_not_allowed": "The picture's address is not allowed",
    "uri_unreachable": "The picture could not be fetched",
    "uri_digest": "The picture is not the one that the record states",
    "schema_unavailable": "The schema registry failed at its schema",
    "corrupt": "The record is damaged in the log",
    "crashed": "Validating it ended the process",
    "internal": "Ratchet made a mistake",
}


@router.get("/quarantine")
def quarantine(
    context: Reader,
    reason: Annotated[str, Query(max_length=40)] = "",
    source: Annotated[str, Query(max_length=256)] = "",
) -> Response:
    chosen = reason if reason in WORDS else None
    rows = list_quarantine(context.data.settings, context.data.ledger, SHOWN, chosen, source or None)
    counts = context.data.cached("refusals", lambda: quarantine_counts(context.data.store), seconds=10.0)
    sources = [(name, count) for name, count in counts["source"].top(SOURCES) if name and name != OTHERS]
    return context.page(
        "quarantine.html", "Quarantine", rows=rows, reason=chosen or "", words=WORDS, most=SHOWN, source=source,
        sources=sources, counts=counts["reason"].counts,
    )  # fmt: skip


@router.get("/quarantine/{place}/picture")
def picture(context: Reader, place: str) -> Response:
    _, image, _ = _record(context, place)
    return drawn(context.data.draw(image, 192) if image else None)


@router.get("/quarantine/{place}")
def look(context: Reader, place: str) -> Response:
    return _shown(context, place)


@router.post("/quarantine/{place}/resubmit")
def again(context: Operator, place: str, reason: Why = "", force: Annotated[bool, Form()] = False) -> Response:
    if not reason.strip():
        return _shown(context, place, wrong="Say why: it is kept in the audit log.", status=400)
    assert context.principal is not None
    data, actor = context.data, context.principal.actor()
    try:
        delivery = resubmit(data.settings, data.ledger, place, actor=actor, reason=reason.strip(), force=force)
    except UnknownRecord as error:
        raise ErrorPage(404, "There is no such record", error.message, error.fix) from None
    except AlreadyResubmitted as error:
        return _shown(context, place, wrong=error.message, force=True, typed=reason, status=409)
    except RatchetError as error:
        return _shown(context, place, wrong=str(error), typed=reason, status=502)
    return context.dialog("resubmitted.html", "Sent again", place=place, delivery=delivery)


def _shown(
    context: RequestContext, place: str, *, wrong: str = "", force: bool = False, typed: str = "", status: int = 200
) -> Response:
    size, _, texts = _record(context, place)
    before = context.data.ledger.resubmissions([place]).get(place)
    return context.dialog(
        "record.html", "A refused record", status, place=place, texts=texts, size=size, before=before, wrong=wrong,
        force=force or before is not None, typed=typed,
    )  # fmt: skip


def _record(context: RequestContext, place: str) -> tuple[int, bytes | None, dict[str, str]]:
    settings = context.data.settings
    try:
        record = quarantined(settings, place)
    except UnknownRecord as error:
        raise ErrorPage(404, "There is no such record", error.message, "See the list.") from None
    image, texts = glimpse(record.value, record.headers, max_image_bytes=settings.ingest.max_image_bytes)
    return len(record.value or b""), image, texts
