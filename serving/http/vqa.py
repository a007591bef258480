"""POST /v1/vqa: one question about one image, answered freely or by one of given choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field, StringConstraints, field_validator

from serving.engines.vlm.generation import question
from serving.http.app_state import VLM, app_state
from serving.http.bodies import (
    VLM_MODEL,
    Body,
    ChatUsage,
    Name,
    Picture,
    ResponseBody,
    body_schemas,
    distinct,
    read_body,
)
from serving.http.chunks import usage
from serving.http.errors import ApiError
from serving.http.request_bodies import caller_of

router = APIRouter(tags=["Questions about images"])
_Choice = Annotated[Name, StringConstraints(strip_whitespace=True)]


class VqaRequest(Body):
    """One question about one image."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"image": "data:image/png;base64,iVBORw0KGgo...", "question": "what colour is the bus?"},
                {"image": "data:image/png;base64,iVBORw0KGgo...", "question": "is this a shoe?",
                 "choices": ["yes", "no"]},
            ]
        },
    )  # fmt: skip
    image: Picture = Field(description="A data URI, or a URL.")
    question: str = Field(min_length=1, description="The question.")
    choices: Annotated[list[_Choice], Field(fail_fast=True)] | None = Field(
        None, min_length=2, max_length=16, description="Answers to choose from; unset: a free answer."
    )
    model: str = VLM_MODEL

    _distinct = field_validator("choices")(distinct)


class Choice(ResponseBody):
    """A given answer and its probability."""

    text: str
    probability: float
    """From 0 to 1; those of all choices add up to 1."""


class VqaAnswer(ResponseBody):
    """The answer to a question about an image."""

    object: Literal["vqa"]
    answer: str
    choices: list[Choice]
    """In the order of the request; empty without choices."""
    usage: ChatUsage | None
    """Null if the request has choices, which are scored, not generated."""
    model: str
    """`vlm@` and the number of the release."""
    release: int
    adapter: str
    """The adapter's name; `base`: the base alone."""


@router.post(
    "/v1/vqa",
    summary="Answer a question about an image",
    response_model=VqaAnswer,
    openapi_extra=body_schemas(VqaRequest, "image"),
)
async def vqa(request: Request) -> JSONResponse:
    """A short, deterministic answer. With `choices`: the most likely of them, and the probability of each.

    As multipart: `image` is a file; `choices` are repeated fields or one JSON list. The image by itself may be the
    body, with the other fields in the query.
    """
    state = app_state(request)
    vlms = state.need_vlms()
    body, uploads = await read_body(request, VqaRequest, "image", {"choices"}, max_files=1)
    state.check_length("question", body.question)
    async with state.answering(request, body.model, VLM) as (snapshot, deadline):
        images = [("image", uploads[0] if uploads else body.image)]
        async with state.image_loader.pictures(images, caller_of(request.scope)) as (picture,):
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
            state.offer(generation)
        origin = {"model": f"vlm@{snapshot.release}", "release": snapshot.release, "adapter": snapshot.vlm_adapter}
        return JSONResponse({"object": "vqa", **answer, **origin}, headers=state.headers(request, "vqa", snapshot, VLM))


def normalised(scores: Sequence[float]) -> list[float]:
    """Log-probabilities of choices as probabilities that sum to 1. Raises ApiError (500) when a score is not a number,
    or none is finite."""
    highest = max(scores)
    if any(math.isnan(score) for score in scores) or not math.isfinite(highest):
        raise ApiError(500, "the model gave no usable probabilities.", code="not_finite")
    weights = [math.exp(score - highest) for score in scores]
    total = math.fsum(weights)
    return [weight / total for weight in weights]
