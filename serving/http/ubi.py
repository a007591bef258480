"""POST /v1/feedback/ubi: events of OpenSearch's User Behavior Insights (https://github.com/o19s/ubi, schema 1.3) as
feedback. An event names the answer by its ``query_id``."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, RootModel

from core.ledger.rows import ReportedVerdict
from serving.http.answer_receipts import HEADER
from serving.http.bodies import ResponseBody, checked, inline, json_body
from serving.http.errors import ApiError, field_error
from serving.http.feedback import FeedbackRequest, record

router = APIRouter(tags=["Feedback"])
MAX_EVENTS: Final = 100
TAKEN: Final = ("click", "click_through", "item_click", "product_click", "watch", "add_to_cart", "purchase")
VERDICTS: Final[dict[str, ReportedVerdict]] = {
    **dict.fromkeys(TAKEN, "chosen"),
    **dict.fromkeys(("thumbs_up", "like"), "right"),
    **dict.fromkeys(("thumbs_down", "dislike"), "wrong"),
}
"""By action. Others, like `impression` and `view`, say nothing about an answer."""


class UbiObject(BaseModel):
    """The object of an event."""

    object_id: str | int | None = Field(None, description="ID of a sample, as the answer of a search has it.")


class UbiPosition(BaseModel):
    """Where it was."""

    ordinal: int | None = Field(None, description="Place in the answer, from 1; counts without an `object_id`.")


class UbiAttributes(BaseModel):
    """Details of an event."""

    object: UbiObject | None = None
    position: UbiPosition | None = None


class UbiEvent(BaseModel):
    """An event. Other fields of the schema may be there, and are not kept."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"action_name": "click", "query_id": "a1.Xk2...", "timestamp": "2026-01-02T03:04:05Z",
                 "event_attributes": {"position": {"ordinal": 1}}},
            ]
        },
    )  # fmt: skip
    action_name: str = Field(max_length=100, description=f"These count: {', '.join(VERDICTS)}.")
    timestamp: datetime = Field(description="When it happened; not kept.")
    query_id: str | None = Field(
        None, description=f"The header `{HEADER}` of the answer.", json_schema_extra={"format": "answer"}
    )
    event_attributes: UbiAttributes | None = None

    def as_feedback(self, verdict: ReportedVerdict) -> FeedbackRequest:
        """Raises ApiError."""
        if self.query_id is None:
            raise field_error("query_id", f"give the header {HEADER} of the answer.", "missing_value")
        fields: dict[str, Any] = {"answer": self.query_id, "verdict": verdict}
        about = self.event_attributes
        if verdict == "chosen" and about is not None:
            if about.object is not None and about.object.object_id is not None:
                fields["object_id"] = about.object.object_id
            elif about.position is not None and about.position.ordinal is not None:
                fields["position"] = about.position.ordinal - 1
        return checked(FeedbackRequest, fields)


def _listed(body: Any) -> Any:
    return [body] if isinstance(body, dict) else body


class _Events(RootModel[list[Any]]):
    root: Annotated[list[Any], BeforeValidator(_listed), Field(max_length=MAX_EVENTS)]


class UbiRefusal(ResponseBody):
    """An event that was not recorded."""

    index: int
    """Its place in the list, from 0."""
    code: str
    message: str


class UbiReport(ResponseBody):
    """What became of the events."""

    object: Literal["feedback.ubi"]
    recorded: int
    repeated: int
    """Said before; they count once."""
    ignored: int
    """Of actions that say nothing about an answer."""
    refused: list[UbiRefusal]


_EVENT = inline(UbiEvent)
_BODY = {"anyOf": [_EVENT, {"type": "array", "items": _EVENT, "maxItems": MAX_EVENTS}]}


@router.post(
    "/v1/feedback/ubi",
    summary="Report answers by events of User Behavior Insights",
    response_model=UbiReport,
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": _BODY}}}},
)
async def ubi(request: Request) -> JSONResponse:
    """One event of OpenSearch's UBI (schema 1.3), or a list of at most 100. Needs the scope `feedback`.

    Events count as reports to `/v1/feedback` do: once for each answer and caller, and a refused one has the `code` it
    would have there. The others of its list count.
    """
    events = (await json_body(request, _Events)).root
    counts = {"recorded": 0, "repeated": 0, "ignored": 0}
    refused = []
    for index, fields in enumerate(events):
        try:
            event = checked(UbiEvent, fields)
            verdict = VERDICTS.get(event.action_name)
            if verdict is None:
                counts["ignored"] += 1
                continue
            _, new = await record(request, event.as_feedback(verdict))
            counts["recorded" if new else "repeated"] += 1
        except ApiError as error:
            refused.append({"index": index, "code": error.code, "message": error.detail})
    return JSONResponse({"object": "feedback.ubi", **counts, "refused": refused})
