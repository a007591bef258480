"""POST /v1/classify: zero-shot classification with prompt templates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request, Response

from serving.http.app_state import app_state, release_headers
from serving.http.cancel_on_disconnect import cancel_on_disconnect
from serving.http.image_bodies import body_schemas, read_body
from serving.http.json_bodies import json_response
from serving.http.request_bodies import caller_of
from serving.http.response_schemas import ClassificationList
from serving.http.schemas import ClassifyRequest

router = APIRouter(tags=["Zero-shot"])
LISTS = {"labels", "templates"}
PROMPTS_PER_TEXT = 8
"""Labels x templates may be this many times ``max_texts``: prompts are short, and made by the server."""


@router.post(
    "/v1/classify",
    summary="Which label fits each image",
    response_model=ClassificationList,
    openapi_extra=body_schemas(ClassifyRequest, "images"),
)
async def classify(request: Request) -> Response:
    """Probabilities over the labels for each image. A label's vector is the mean over the templates (CLIP, 2021).

    As multipart: `images` are files; `labels` and `templates` are repeated fields or JSON lists. An image by itself may
    be the body, with the other fields in the query.
    """
    state = app_state(request)
    body, uploads = await read_body(request, ClassifyRequest, "images", LISTS, state.settings.max_images)
    state.check_texts(body.labels, "labels")
    prompts = [template.replace("{}", label) for label in body.labels for template in body.templates]
    state.check_texts(prompts, "templates", state.settings.max_texts * PROMPTS_PER_TEXT)
    deadline = state.deadline()
    sources: Sequence[str | bytes] = uploads or body.images
    with state.admit(request, body.model) as snapshot:
        async with cancel_on_disconnect(request.receive, deadline):
            images = await state.vectors.of_images(
                [(f"images.{index}", image) for index, image in enumerate(sources)], snapshot, deadline,
                caller_of(request),
            )  # fmt: skip
            texts = await state.vectors.of_texts(prompts, snapshot, deadline)
        shares = probabilities(images.rows, texts.rows, len(body.templates), images.logit_scale)
        results = [
            {
                "label": body.labels[int(row.argmax())],
                "probabilities": dict(zip(body.labels, row.tolist(), strict=True)),
            }
            for row in shares
        ]
        return json_response(
            {"object": "list", "model": f"clip@{snapshot.release}", "data": results}, release_headers(snapshot)
        )


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
