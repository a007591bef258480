"""POST /v1/vqa: one question about one image, answered freely or by one of given choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from serving.engines.vlm.generation import question
from serving.http.app_state import VLM, app_state, release_headers
from serving.http.cancel_on_disconnect import cancel_on_disconnect
from serving.http.chunks import usage
from serving.http.errors import ApiError
from serving.http.image_bodies import body_schemas, read_body
from serving.http.request_bodies import caller_of
from serving.http.response_schemas import VqaAnswer
from serving.http.schemas import VqaRequest

router = APIRouter(tags=["Questions about images"])


@router.post(
    "/v1/vqa",
    summary="Answer a question about an image",
    response_model=VqaAnswer,
    openapi_extra=body_schemas(VqaRequest, "image"),
)
async def vqa(request: Request) -> JSONResponse:
    """A short answer, always the likeliest. With `choices`: the likeliest of them, and the probability of each.

    As multipart: `image` is a file; `choices` are repeated fields or one JSON list. The image by itself may be the
    body, with the other fields in the query.
    """
    state = app_state(request)
    vlms = state.need_vlms()
    body, uploads = await read_body(request, VqaRequest, "image", {"choices"}, max_files=1)
    state.check_length("question", body.question)
    deadline = state.deadline()
    with state.admit(request, body.model, VLM) as snapshot:
        async with cancel_on_disconnect(request.receive, deadline):
            images = [("image", uploads[0] if uploads else body.image)]
            async with state.image_loader.pictures(images, caller_of(request)) as (picture,):
                generation = question(picture, body.question)
                generation = replace(generation, max_tokens=min(generation.max_tokens, state.settings.vlm_max_tokens))
                answer: dict[str, Any]
                if body.choices is None:
                    reply = await vlms.reply(generation, snapshot, deadline)
                    counted = usage(reply.prompt_tokens, len(reply.tokens))
                    answer = {"answer": reply.text.strip(), "choices": [], "usage": counted}
                else:
                    shares = normalised(await vlms.score(generation, body.choices, snapshot, deadline))
                    rows = [{"text": text, "probability": p} for text, p in zip(body.choices, shares, strict=True)]
                    answer = {"answer": body.choices[shares.index(max(shares))], "choices": rows, "usage": None}
        origin = {"model": f"vlm@{snapshot.release}", "release": snapshot.release, "adapter": snapshot.vlm_adapter}
        return JSONResponse({"object": "vqa", **answer, **origin}, headers=release_headers(snapshot, VLM))


def normalised(scores: Sequence[float]) -> list[float]:
    """Log-probabilities of choices as probabilities that sum to 1.

    Raises:
        ApiError: 500 when a score is not a number, or none is finite.
    """
    highest = max(scores)
    if any(math.isnan(score) for score in scores) or not math.isfinite(highest):
        raise ApiError(500, "the model gave no usable probabilities.", code="not_finite")
    weights = [math.exp(score - highest) for score in scores]
    total = math.fsum(weights)
    return [weight / total for weight in weights]
