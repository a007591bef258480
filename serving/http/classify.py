"""POST /v1/classify: zero-shot classification with prompt templates, or by a head that the release has learned."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request, Response

from serving.engines.heads import Answers, Head, backed_off
from serving.http.app_state import app_state, release_headers
from serving.http.cancel_on_disconnect import cancel_on_disconnect
from serving.http.image_bodies import body_schemas, read_body
from serving.http.json_bodies import json_response
from serving.http.request_bodies import caller_of
from serving.http.response_schemas import ClassificationList
from serving.http.schemas import ClassifyRequest
from serving.messages import PROMPTS_PER_TEXT

router = APIRouter(tags=["Zero-shot"])
LISTS = {"labels", "templates"}
LIKELY = 0.5
"""Of several labels those are said that are likelier than not, where the request does not say how sure they must be."""


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
    body, uploads = await read_body(request, ClassifyRequest, "images", LISTS, state.settings.max_images)
    sources: Sequence[str | bytes] = uploads or body.images
    if body.head:
        return await _by_head(request, body, sources)
    state.check_texts(body.labels, "labels")
    prompts = [template.replace("{}", label) for label in body.labels for template in body.templates]
    state.check_texts(prompts, "templates", state.settings.max_texts * PROMPTS_PER_TEXT)
    deadline = state.deadline()
    with state.admit(request, body.model) as snapshot:
        async with cancel_on_disconnect(request.receive, deadline):
            images = await state.vectors.of_images(
                [(f"images.{index}", image) for index, image in enumerate(sources)], snapshot, deadline,
                caller_of(request),
            )  # fmt: skip
            whole = () if body.truncate else [f"labels.{n}" for n in range(len(body.labels)) for _ in body.templates]
            texts = await state.vectors.of_texts(prompts, snapshot, deadline, caller_of(request), whole)
        shares = probabilities(images.rows, texts.rows, len(body.templates), images.logit_scale)
        results = [
            {
                "label": body.labels[int(row.argmax())],
                "probabilities": dict(zip(body.labels, row.tolist(), strict=True)),
            }
            for row in shares
        ]
        return json_response(
            {"object": "list", "model": f"clip@{snapshot.release}", "data": results},
            release_headers(snapshot) | texts.headers,
        )


async def _by_head(request: Request, body: ClassifyRequest, sources: Sequence[str | bytes]) -> Response:
    state = app_state(request)
    deadline = state.deadline()
    with state.admit(request, body.model) as snapshot:
        async with cancel_on_disconnect(request.receive, deadline):
            head = await state.heads.find(body.head, snapshot, deadline)
            images = await state.vectors.of_images(
                [(f"images.{index}", image) for index, image in enumerate(sources)], snapshot, deadline,
                caller_of(request),
            )  # fmt: skip
            answers = await state.heads.classify(head, images.rows)
        return json_response(
            {
                "object": "list",
                "model": f"clip@{snapshot.release}",
                "data": [_said(head, answers, row, body) for row in range(len(images.rows))],
            },
            release_headers(snapshot),
        )


def _said(head: Head, answers: Answers, row: int, body: ClassifyRequest) -> dict[str, object]:
    """What a head says of one image."""
    shares = answers.alone[row] if body.multi_label else answers.probabilities[row]
    known = bool(answers.distance[row] <= 1)
    said: dict[str, object] = {
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


def probabilities(
    images: npt.NDArray[np.float32], prompts: npt.NDArray[np.float32], templates: int, scale: float
) -> npt.NDArray[np.float64]:
    """Softmax over labels [images, labels], from unit vectors [images, dim] and [labels x templates, dim]."""
    labels = prompts.reshape(-1, templates, prompts.shape[1]).astype(np.float64).mean(axis=1)
    labels /= np.linalg.norm(labels, axis=1, keepdims=True).clip(1e-12)
    logits = scale * images.astype(np.float64) @ labels.T
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: npt.NDArray[np.float64] = shares / shares.sum(axis=1, keepdims=True)
    return result
