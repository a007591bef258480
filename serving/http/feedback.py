"""Feedback: reports of callers on answers."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field

from core.access import Principal
from core.digests import digest12, digest_bytes
from core.errors import FeedbackRefused
from core.ledger.rows import CorrectionState, FeedbackRow, ReportedVerdict
from core.ledger.wrong_answers import ROUTES
from serving.http.answer_audits import MAX_IMAGE_BYTES
from serving.http.answer_receipts import HEADER, MAX_CHARS, MOST_SHOWN, AnswerReceipt, Route
from serving.http.app_state import CLIP, AppState, app_state
from serving.http.bodies import Body, ResponseBody, SampleId, json_body, json_schema
from serving.http.errors import ApiError, ErrorBody, field_error
from serving.http.image_loader import from_data_uri
from serving.http.request_bodies import caller_of

router = APIRouter(tags=["Feedback"])


class FeedbackRequest(Body):
    """A report on one answer."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"answer": "a1.Xk2...", "verdict": "correct", "label": "fire truck"},
                {"answer": "a1.Xk2...", "verdict": "chosen", "position": 2},
            ]
        },
    )
    answer: str = Field(
        description=f"The header `{HEADER}` of the answer.",
        json_schema_extra={"format": "answer", "maxLength": MAX_CHARS},
    )
    verdict: ReportedVerdict = Field(
        description="`right`; `wrong`; `correct`: wrong, and `label` or `text` says what is right; `chosen`: the found "
        "sample that was taken, by `object_id` or `position`."
    )
    label: str | None = Field(None, min_length=1, max_length=512, description="The right class.")
    text: str | None = Field(None, min_length=1, max_length=4096, description="The right caption or answer.")
    image: str | None = Field(
        None,
        max_length=2 * MAX_IMAGE_BYTES,
        description="With `wrong` or `correct` about embeddings, a class or a search: the image as a data URI, so that "
        "it becomes a sample, with `text` or `label` or what an operator says is right, once one has accepted it.",
        json_schema_extra={"format": "uri"},
    )
    object_id: SampleId | None = Field(None, description="A sample that the answer of a search named.")
    position: int | None = Field(None, ge=0, lt=MOST_SHOWN, description="Its place in the answer, from 0.")
    comment: str | None = Field(None, min_length=1, max_length=2000, description="For the people who read it.")


class FeedbackBody(ResponseBody):
    """Feedback as it was recorded."""

    object: Literal["feedback"]
    id: str
    release: int
    """That gave the answer."""
    route: Route
    verdict: ReportedVerdict
    state: CorrectionState | None
    """Of a report with an image: it waits for a review."""
    created_at: datetime
    repeated: bool
    """True if the same was said before; it counts once."""


@router.post(
    "/v1/feedback",
    summary="Report an answer",
    status_code=201,
    response_model=FeedbackBody,
    responses={
        200: {"model": FeedbackBody, "description": "The same was said before."},
        409: {"model": ErrorBody, "description": "`feedback_exists`: you said something else of this answer."},
        410: {"model": ErrorBody, "description": "`sample_deleted`: the sample was deleted."},
    },
    openapi_extra=json_schema(FeedbackRequest),
)
async def feedback(request: Request) -> JSONResponse:
    """Say whether an answer was right, and what would be. Needs the scope `feedback`.

    Recorded before it is acknowledged, once for each answer and caller, and told as the event `ratchet.feedback.v1`.
    """
    recorded, new = await record(request, await json_body(request, FeedbackRequest))
    answer = {
        "object": "feedback", "id": recorded.id, "release": recorded.release, "route": recorded.route,
        "verdict": recorded.verdict, "state": recorded.state, "created_at": recorded.created_at.isoformat(),
        "repeated": not new,
    }  # fmt: skip
    return JSONResponse(answer, 201 if new else 200)


async def record(request: Request, wanted: FeedbackRequest) -> tuple[FeedbackRow, bool]:
    """Check a report and record it once. Returns its row, and False if its caller said the same before. Raises
    ApiError."""
    state = app_state(request)
    receipt = state.answers.read(wanted.answer)
    detail = wanted.model_dump(exclude_none=True, exclude={"answer", "verdict", "image"})
    if wanted.verdict == "correct" and not (wanted.label or wanted.text):
        raise field_error("label", "a correction says what is right, as label or text.", "missing_value")
    await _check_sample(state, wanted, receipt, detail)
    image = await _image(state, wanted, receipt, detail, caller_of(request.scope))
    principal: Principal = request.state.principal
    row = FeedbackRow(
        id=digest_bytes(receipt.key.encode(), principal.name.encode()), caller=principal.name, release=receipt.release,
        route=receipt.route, input=receipt.input, answered_at=receipt.at, verdict=wanted.verdict, detail=detail,
        state=None if image is None else "waiting", image=image,
    )  # fmt: skip
    try:
        return await state.feedback.record(row)
    except FeedbackRefused as error:
        if error.too_many:
            raise ApiError(429, str(error), code="rate_limited", headers={"Retry-After": "3600"}) from None
        raise ApiError(409, str(error), param="verdict", code="feedback_exists") from None


async def _image(
    state: AppState, wanted: FeedbackRequest, receipt: AnswerReceipt, detail: dict[str, object], caller: str
) -> bytes | None:
    """Check the image of a wrong answer. Its digest stays in ``detail`` after the image is removed: a report with
    another image is another one."""
    if wanted.image is None:
        return None
    if wanted.verdict not in ("wrong", "correct") or receipt.route not in ROUTES[CLIP]:
        about = ", ".join(ROUTES[CLIP])
        raise field_error("image", f"only a wrong answer about {about} has an image.", "invalid_value")
    image = from_data_uri(wanted.image, "image", MAX_IMAGE_BYTES)
    (inspected,) = await state.image_loader.inspect([("image", image)], caller)
    detail["image_digest"] = digest12(inspected.digest.hex())
    return image


async def _check_sample(
    state: AppState, wanted: FeedbackRequest, receipt: AnswerReceipt, detail: dict[str, object]
) -> None:
    """Check that the answer showed the named sample, and that it is still there."""
    if wanted.verdict == "chosen" and wanted.object_id is None and wanted.position is None:
        raise field_error("position", "say which sample was chosen, by position or object_id.", "missing_value")
    if wanted.position is not None and wanted.position >= len(receipt.shown):
        raise field_error("position", f"the answer showed {len(receipt.shown)} samples.", "invalid_value")
    if wanted.object_id is None:
        return
    if wanted.object_id[:12] not in receipt.shown:
        raise field_error("object_id", "the answer did not show this sample.", "invalid_value")
    place = receipt.shown.index(wanted.object_id[:12])
    if wanted.position not in (None, place):
        raise field_error("position", f"this sample was at {place}.", "invalid_value")
    detail["position"] = place
    outcomes = [each["outcome"] for each in await state.receipts.of_sample(wanted.object_id)]
    if "stored" not in outcomes:
        raise ApiError(410, "this sample was deleted.", param="object_id", code="sample_deleted")
