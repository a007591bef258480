"""POST /v1/classify: zero-shot classification with prompt templates, or by a head that the release has learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, FailFast, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from serving.engines.heads import Head, HeadScores, backed_off
from serving.http.answer_receipts import HEADER
from serving.http.app_state import app_state
from serving.http.bodies import (
    MODEL,
    SPACE,
    TRUNCATE,
    Body,
    Name,
    Picture,
    ResponseBody,
    body_schemas,
    distinct,
    json_response,
    read_body,
)
from serving.http.calibrations import MIN_PROBABILITY
from serving.http.request_bodies import caller_of
from serving.messages import IMAGES_PER_REQUEST, PROMPTS_PER_TEXT, TEXTS_PER_REQUEST

router = APIRouter(tags=["Zero-shot"])
LISTS = {"labels", "templates"}
LIKELY = 0.5
"""Default confidence for several labels."""


class ClassifyRequest(Body):
    """Classification: which of these labels fits each image, or which class of a head that the release has learned."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"images": ["data:image/png;base64,iVBORw0KGgo..."], "labels": ["cat", "dog"],
                 "templates": ["a photo of a {}."]},
                {"images": ["data:image/png;base64,iVBORw0KGgo..."], "head": "garments", "confidence": 0.5},
            ],
            "oneOf": [{"required": ["labels"]}, {"required": ["head"]}],
            "dependentRequired": {"multi_label": ["head"], "confidence": ["head"], "min_probability": ["labels"]},
        },
    )  # fmt: skip
    images: Annotated[list[Picture], FailFast()] = Field(min_length=1, description="Data URIs, or URLs.")
    labels: Annotated[list[Name], FailFast()] = Field([], min_length=1, description="Possible labels.")
    templates: Annotated[list[Name], FailFast()] = Field(
        ["{}"], min_length=1, max_length=100, description="Texts with `{}` for the label."
    )
    head: str = Field("", min_length=1, max_length=64, description="A head of the release, instead of labels.")
    multi_label: bool = Field(
        False, description="With a head: return all classes with at least the probability `confidence`."
    )
    confidence: float | None = Field(
        None,
        ge=0,
        le=1,
        description="With a head: minimum probability of a label; below it, the answer is a higher level, or null.",
    )
    min_probability: float | None = MIN_PROBABILITY
    truncate: bool = TRUNCATE
    space: str | None = SPACE
    model: str = MODEL

    @model_validator(mode="after")
    def one_way(self) -> Self:
        if bool(self.labels) == bool(self.head):
            raise PydanticCustomError("one_way", "give labels, or the name of a head", {"param": "labels"})
        if not self.head and (self.multi_label or self.confidence is not None):
            raise ValueError("multi_label and confidence are of a head")
        if self.head and self.min_probability is not None:
            raise ValueError("min_probability is of labels: with a head give its confidence")
        return self

    _distinct = field_validator("labels")(distinct)

    @field_validator("templates")
    @classmethod
    def with_a_place(cls, value: list[str]) -> list[str]:
        if any(template.count("{}") != 1 for template in value):
            raise ValueError("each template needs exactly one {} for the label")
        return value


class Classification(ResponseBody):
    """One image's labels."""

    label: str | None
    """The most likely label; null if it does not reach `min_probability`, and with a head if none of its classes fits,
    or none reaches `confidence`."""
    probabilities: dict[str, float | None]
    """From 0 to 1 by label; they add up to 1, but for several labels: then each stands alone."""
    matches: dict[str, float | None] | None = None
    """Of labels: the probability by label that the image shows it, whatever the other labels are. Null, or left out
    with a head, without a calibration."""
    labels: list[str] | None = None
    """With several labels: those with a probability above one half, most likely first."""
    distance: float | None = None
    """Of a head: how far the image is from the nearest class; above 1 it is none of them."""


class ClassificationList(ResponseBody):
    """Labels in the order of the images."""

    object: Literal["list"]
    model: str
    """`clip@` and the number of the release."""
    data: list[Classification]


@router.post(
    "/v1/classify",
    summary="Which label fits each image",
    response_model=ClassificationList,
    openapi_extra=body_schemas(ClassifyRequest, "images"),
)
async def classify(request: Request) -> Response:
    """Probabilities over the labels for each image. A label's vector is the mean over the templates (CLIP, 2021).

    With `head` the classes are those of a head: class means and a covariance that updates learn from labelled samples,
    in the image space of the release. An image that is far from all of them has the label null. Labels that are paths
    (`animal/bird`) back off to a level that has the probability `confidence`.

    As multipart: `images` are files; `labels` and `templates` are repeated fields or JSON lists. An image by itself may
    be the body, with the other fields in the query.
    """
    state = app_state(request)
    body, uploads = await read_body(request, ClassifyRequest, "images", LISTS, IMAGES_PER_REQUEST)
    sources: Sequence[str | bytes] = uploads or body.images
    images = [(f"images.{index}", image) for index, image in enumerate(sources)]
    prompts = [template.replace("{}", label) for label in body.labels for template in body.templates]
    if not body.head:
        state.check_texts(body.labels, "labels")
        state.check_texts(prompts, "templates", TEXTS_PER_REQUEST * PROMPTS_PER_TEXT)
    caller = caller_of(request.scope)
    async with state.answering(request, body.model, space=body.space) as (snapshot, deadline):
        headers = state.headers(request, "classify", snapshot)
        if body.head:
            head = await state.vectors.head(body.head, snapshot, deadline)
            vectors = await state.vectors.of_images(images, snapshot, deadline, caller)
            answers = await state.vectors.classify(head, vectors.rows)
            data = [_said(head, answers, row, body) for row in range(len(images))]
        else:
            curve = await state.calibrations.curve("label", snapshot, body.min_probability)
            vectors = await state.vectors.of_images(images, snapshot, deadline, caller)
            whole = () if body.truncate else [f"labels.{n}" for n in range(len(body.labels)) for _ in body.templates]
            texts = await state.vectors.of_texts(prompts, snapshot, deadline, caller, whole)
            headers |= texts.headers
            templates = len(body.templates)
            matches = None if curve is None else curve(similarities(vectors.rows, texts.rows, templates))
            data = [
                _labelled(body, shares, None if matches is None else matches[row])
                for row, shares in enumerate(probabilities(vectors.rows, texts.rows, templates, vectors.logit_scale))
            ]
        if state.audits is not None:
            state.audits.offer(headers[HEADER], sources, [each["label"] for each in data])
        return json_response({"object": "list", "model": f"clip@{snapshot.release}", "data": data}, headers)


def _labelled(
    body: ClassifyRequest, shares: npt.NDArray[np.float64], matches: npt.NDArray[np.float64] | None
) -> dict[str, Any]:
    """The labels of one image. ``matches``: probabilities by label that it shows it."""
    best = int(shares.argmax())
    shown = matches is None or body.min_probability is None or matches[best] >= body.min_probability
    return {
        "label": body.labels[best] if shown else None,
        "probabilities": dict(zip(body.labels, shares.tolist(), strict=True)),
        "matches": None if matches is None else dict(zip(body.labels, matches.tolist(), strict=True)),
    }


def _said(head: Head, answers: HeadScores, row: int, body: ClassifyRequest) -> dict[str, Any]:
    """A head's answer about one image."""
    shares = answers.alone[row] if body.multi_label else answers.probabilities[row]
    known = bool(answers.distance[row] <= 1)
    said: dict[str, Any] = {
        "label": backed_off(head.labels, shares, body.confidence or 0.0)[0] if known else None,
        "probabilities": dict(zip(head.labels, shares.tolist(), strict=True)),
        "distance": float(answers.distance[row]),
    }
    if body.multi_label:
        order = np.argsort(-shares, kind="stable")
        least = LIKELY if body.confidence is None else body.confidence
        said["labels"] = [head.labels[place] for place in order if shares[place] >= least] if known else []
        said["label"] = head.labels[int(order[0])] if said["labels"] else None
    return said


def similarities(
    images: npt.NDArray[np.float32], prompts: npt.NDArray[np.float32], templates: int
) -> npt.NDArray[np.float64]:
    """Cosines [images, labels], from unit vectors [images, dim] and [labels x templates, dim]."""
    labels = prompts.reshape(-1, templates, prompts.shape[1]).astype(np.float64).mean(axis=1)
    labels /= np.linalg.norm(labels, axis=1, keepdims=True).clip(1e-12)
    cosines: npt.NDArray[np.float64] = images.astype(np.float64) @ labels.T
    return cosines


def probabilities(
    images: npt.NDArray[np.float32], prompts: npt.NDArray[np.float32], templates: int, scale: float
) -> npt.NDArray[np.float64]:
    """Softmax over labels [images, labels]; arguments as in :func:`similarities`."""
    logits = scale * similarities(images, prompts, templates)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: npt.NDArray[np.float64] = shares / shares.sum(axis=1, keepdims=True)
    return result
