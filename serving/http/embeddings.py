"""POST /v1/embeddings and GET /v1/models, as in the OpenAI API; inputs may be images too."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pybase64
from fastapi import APIRouter, Request, Response
from fastapi import Path as PathParameter

from core.ledger.rows import Family
from serving.http.app_state import CLIP, VLM, AppState, app_state, release_headers
from serving.http.cancel_on_disconnect import cancel_on_disconnect
from serving.http.clip_vectors import Vectors
from serving.http.errors import ApiError
from serving.http.image_bodies import FormField, body_schemas, fields_of, read_parts
from serving.http.image_loader import ImageSource, gathered
from serving.http.json_bodies import checked, json_body, json_response
from serving.http.request_bodies import caller_of
from serving.http.response_schemas import EmbeddingList, ModelBody, ModelList
from serving.http.schemas import EmbeddingsRequest, ImageUrlItem, Item, TextItem
from serving.releases.types import ReleaseSnapshot

router = APIRouter(tags=["OpenAI compatible"])
Input = str | ImageSource
"""A text, or an image."""
INPUT_NAMES = ("input", "input[]")
FORM_INPUT: dict[str, Any] = {
    "type": "array", "minItems": 1, "items": {"anyOf": [{"type": "string", "format": "binary"}, {"type": "string"}]},
}  # fmt: skip


@router.post(
    "/v1/embeddings",
    summary="Embed texts and images",
    response_model=EmbeddingList,
    openapi_extra=body_schemas(EmbeddingsRequest, "input", FORM_INPUT),
)
async def embeddings(request: Request) -> Response:
    """Vectors of unit length, in the order of the inputs. All are made by the release in `x-ratchet-release`.

    An image is `{"image": "data:image/png;base64,..."}`, or a URL where the server fetches them. As multipart, each
    `input` is a text or a file. An image by itself may be the body, with the other fields in the query. Compare vectors
    of one release by dot product.
    """
    state = app_state(request)
    body, inputs = await read_inputs(request, state)
    if body.dimensions is not None and body.dimensions != state.dim:
        raise ApiError(
            400, f"dimensions: this model has {state.dim} dimensions and cannot be cut.", param="dimensions",
            code="unsupported_dimensions",
        )  # fmt: skip
    deadline = state.deadline()
    with state.admit(request, body.model, user=body.user) as snapshot:
        async with cancel_on_disconnect(request.receive, deadline):
            embedded = await embed(state, snapshot, inputs, deadline, caller_of(request), body.truncate)
        data = [
            {"object": "embedding", "index": index, "embedding": encoded(row, body.encoding_format)}
            for index, row in enumerate(embedded.rows)
        ]
        usage: dict[str, Any] = {"prompt_tokens": embedded.tokens, "total_tokens": embedded.tokens}
        if embedded.cut:
            usage["truncated"] = embedded.cut
        return json_response(
            {
                "object": "list", "data": data, "model": f"clip@{snapshot.release}", "usage": usage,
            },
            release_headers(snapshot) | embedded.headers,
        )  # fmt: skip


async def read_inputs(request: Request, state: AppState) -> tuple[EmbeddingsRequest, list[Input]]:
    """What is asked for, and the inputs in their order. Raises ApiError."""
    parts = await read_parts(request, state.settings.max_images)
    if parts is None:
        body = await json_body(request, EmbeddingsRequest)
        return body, [_input(f"input.{index}", item) for index, item in enumerate(body.input)]
    inputs: list[Input] = []
    others: list[FormField] = []
    for name, value in parts:
        if isinstance(value, str) and name not in INPUT_NAMES:
            others.append((name, value))
        elif name in INPUT_NAMES or not name:
            inputs.append(value if isinstance(value, str) else (f"input.{len(inputs)}", value))
        else:
            raise ApiError(400, f"{name[:80]}: files go into the field 'input'.", param=name[:80], code="unknown_field")
    texts = [each if isinstance(each, str) else "an image" for each in inputs]
    return checked(EmbeddingsRequest, {**fields_of(others, set()), "input": texts}), inputs


def _input(place: str, item: Item) -> Input:
    if isinstance(item, str):
        return item
    if isinstance(item, TextItem):
        return item.text
    if isinstance(item, ImageUrlItem):
        return f"{place}.image_url", item.image_url.url
    return f"{place}.image", item.image


async def embed(
    state: AppState, snapshot: ReleaseSnapshot, inputs: list[Input], deadline: float, caller: str, truncate: bool = True
) -> Vectors:
    """Vectors of texts and images, in the order of the inputs."""
    texts = {index: each for index, each in enumerate(inputs) if isinstance(each, str)}
    images = {index: each for index, each in enumerate(inputs) if not isinstance(each, str)}
    state.check_texts(list(texts.values()), "input", places=list(texts))
    whole = () if truncate else [f"input.{place}" for place in texts]
    kinds = []
    if images:
        kinds.append((list(images), state.vectors.of_images(list(images.values()), snapshot, deadline, caller)))
    if texts:
        kinds.append((list(texts), state.vectors.of_texts(list(texts.values()), snapshot, deadline, caller, whole)))
    answers = await gathered(answer for _, answer in kinds)
    vectors = np.zeros((len(inputs), state.dim), np.float32)
    for (places, _), answer in zip(kinds, answers, strict=True):
        vectors[places] = answer.rows
    last, places = answers[-1], kinds[-1][0]  # the texts', where there are any
    cut = tuple(places[each] for each in last.cut)
    return Vectors(vectors, last.logit_scale, last.tokens, cut)


def encoded(row: npt.NDArray[np.float32], how: str) -> Any:
    """One vector as :func:`json_response` takes it."""
    return pybase64.b64encode_as_string(row.astype("<f4", copy=False).tobytes()) if how == "base64" else row


@router.get("/v1/models", summary="Models that requests may name", response_model=ModelList)
async def models(request: Request) -> Response:
    """`clip` and `vlm` are what is live; the others are resident now and stay addressable while in the window. Those of
    a VLM are listed once it has started.
    """
    state = app_state(request)
    rows = [described(state, name, CLIP) for name in state.admission.names(CLIP)]
    if state.vlms is not None and not state.vlms.start_problem:
        taken = {row["id"] for row in rows}
        rows += [described(state, name, VLM) for name in state.admission.names(VLM) if name not in taken]
    return json_response({"object": "list", "data": rows})


@router.get("/v1/models/{model}", summary="One model", response_model=ModelBody)
async def model(
    request: Request, model: Annotated[str, PathParameter(json_schema_extra={"format": "model"})]
) -> Response:
    """The release and, for a CLIP, the embedding spaces behind a name."""
    state = app_state(request)
    known = state.vlms is not None and model in state.admission.names(VLM) and model not in state.admission.names(CLIP)
    return json_response(described(state, model, VLM if known else CLIP))


def described(state: AppState, name: str, family: Family) -> dict[str, Any]:
    """OpenAI's model object, with the release behind it."""
    snapshot = state.admission.resolve(name, family)
    model_object = {
        "id": name, "object": "model", "created": 0, "owned_by": "ratchet", "family": family,
        "release": snapshot.release,
    }  # fmt: skip
    if family == VLM:
        return {**model_object, "adapter": snapshot.vlm_adapter}
    return {
        **model_object, "adapter": snapshot.adapter,
        "image_space": snapshot.image_space, "text_space": snapshot.text_space,
        "dimensions": state.dim,
    }  # fmt: skip
