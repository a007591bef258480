"""POST /v1/classify: zero-shot classification with prompt templates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from serving.http.app_state import app_state, json_body, release_headers
from serving.http.cancel_on_disconnect import cancel_on_disconnect
from serving.http.embeddings import vectors_of
from serving.http.forms import both_schemas, checked, is_form, only, read_form
from serving.http.request_bodies import caller_of
from serving.http.schemas import ClassifyRequest

router = APIRouter(tags=["Zero-shot"])
PROMPTS_PER_TEXT = 8
"""Labels x templates may be this many times ``max_texts``: prompts are short, and made by the server."""


@router.post(
    "/v1/classify", summary="Which label fits each image", openapi_extra=both_schemas(ClassifyRequest, "images")
)
async def classify(request: Request) -> JSONResponse:
    """Probabilities over the labels for each image. A label's vector is the mean over the templates (CLIP, 2021).

    As multipart: `images` are files; `labels` and `templates` are repeated fields or JSON lists.
    """
    state = app_state(request)
    uploads: list[bytes] = []
    if is_form(request):
        fields, files = await read_form(request, state.settings.max_images, {"labels", "templates"})
        uploads = only(files, "images")
        body = checked(ClassifyRequest, {**fields, "images": ["upload"] * len(uploads)})
    else:
        body = await json_body(request, ClassifyRequest)
    state.check_texts(body.labels, "labels")
    prompts = [template.replace("{}", label) for label in body.labels for template in body.templates]
    state.check_texts(prompts, "templates", state.settings.max_texts * PROMPTS_PER_TEXT)
    deadline = state.deadline()
    sources: Sequence[str | bytes] = uploads or body.images
    with state.admit(request, body.model) as snapshot:
        async with cancel_on_disconnect(request.receive, deadline):
            pixels = await state.image_loader.pixels(
                [(f"images.{index}", image) for index, image in enumerate(sources)], caller_of(request)
            )
            images = await state.encoders.encode("image", pixels, snapshot, deadline)
            rows = await state.token_rows(prompts)
            texts = await state.encoders.encode("text", rows, snapshot, deadline)
        shares = probabilities(vectors_of(images), vectors_of(texts), len(body.templates), images.logit_scale)
        results = [
            {
                "label": body.labels[int(row.argmax())],
                "probabilities": {label: float(share) for label, share in zip(body.labels, row, strict=True)},
            }
            for row in shares
        ]
        return JSONResponse(
            {"object": "list", "model": f"clip@{snapshot.release}", "data": results}, headers=release_headers(snapshot)
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
