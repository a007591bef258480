"""POST /v1/embeddings and GET /v1/models, as in the OpenAI API; inputs may be images too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pybase64
from fastapi import APIRouter, Request, Response
from fastapi import Path as PathParameter
from pydantic import ConfigDict, Discriminator, FailFast, Field, Tag, field_validator

from core.ledger.rows import Family
from serving.engines.calibration import shortened
from serving.http.app_state import CLIP, VLM, AppState, app_state
from serving.http.bodies import (
    MODEL,
    SPACE,
    TRUNCATE,
    Body,
    FormField,
    ImageUrl,
    OpenAIBody,
    Picture,
    ResponseBody,
    Usage,
    body_schemas,
    checked,
    fields_of,
    json_body,
    json_response,
    read_parts,
)
from serving.http.clip_vectors import Vectors
from serving.http.errors import field_error
from serving.http.image_loader import ImageSource, gathered
from serving.http.request_bodies import caller_of
from serving.messages import IMAGES_PER_REQUEST
from serving.releases.types import ReleaseSnapshot

router = APIRouter(tags=["OpenAI compatible"])
Input = str | ImageSource
INPUT_NAMES = ("input", "input[]")
FORM_INPUT: dict[str, Any] = {
    "type": "array", "minItems": 1, "items": {"anyOf": [{"type": "string", "format": "binary"}, {"type": "string"}]},
}  # fmt: skip
MAX_INPUTS = 8192
VectorBody = list[float | None] | Annotated[str, Field(json_schema_extra={"contentEncoding": "base64"})]
"""See :func:`encoded`."""


class ImageItem(OpenAIBody, Body):
    """{"image": "data:image/png;base64,..."}"""

    image: Picture


class TextItem(OpenAIBody, Body):
    """{"text": "a cat"}, or {"type": "text", "text": "a cat"}"""

    type: Literal["text"] = "text"
    text: str


class ImageUrlItem(OpenAIBody, Body):
    """{"type": "image_url", "image_url": {"url": "data:..."}}"""

    type: Literal["image_url"]
    image_url: ImageUrl


def _kind_of(value: Any) -> str | None:
    """The tag of an input's intended kind, so that a single error describes it; None: unknown."""
    if isinstance(value, str):
        return "<str>"
    if not isinstance(value, dict):
        return None
    if "image_url" in value or value.get("type") == "image_url":
        return "<image_url>"
    return "<image>" if "image" in value else "<text>"


Item = Annotated[
    Annotated[str, Tag("<str>")]
    | Annotated[ImageItem, Tag("<image>")]
    | Annotated[ImageUrlItem, Tag("<image_url>")]
    | Annotated[TextItem, Tag("<text>")],
    Discriminator(
        _kind_of,
        custom_error_type="input_type",
        custom_error_message="must be a text, or an object with an image or a text",
    ),
]


class EmbeddingsRequest(OpenAIBody, Body):
    """Texts, images (as data URIs or URLs), or both, to embed."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "clip", "input": ["a photo of a cat", "a red circle"]},
                {"model": "clip", "input": [{"image": "data:image/png;base64,iVBORw0KGgo..."}]},
            ]
        }
    )
    input: Annotated[list[Item], FailFast()] = Field(description="A text, an image object, or a list of them.")
    model: str = MODEL
    encoding_format: Literal["float", "base64"] = Field("float", description="base64 is little-endian float32.")
    dimensions: int | None = Field(
        None, description="Numbers in a vector: the first ones, scaled to unit length again. Fewer than all only if "
        "the release's gate showed that its suites keep their scores; the error for another length names these.",
    )  # fmt: skip
    input_type: str | None = Field(
        None, max_length=100, description="As Cohere's and NVIDIA's clients send it; ignored: CLIP embeds queries and "
        "documents alike.",
    )  # fmt: skip
    truncate: bool = TRUNCATE
    space: str | None = SPACE
    user: str | None = Field(
        None, max_length=200, description="The user: during a canary, each user is always answered by the same release."
    )
    safety_identifier: str | None = Field(None, max_length=200, description="OpenAI's newer name of `user`.")

    @field_validator("input", mode="before", json_schema_input_type=Item | list[Item])
    @classmethod
    def listed(cls, value: Any) -> Any:
        """One input as a list of one. Rejects token IDs, which are of another model's tokenizer."""
        first = value[0] if isinstance(value, list) and value else value
        inner = first[0] if isinstance(first, list) and first else first
        if isinstance(inner, int | float) and not isinstance(inner, bool):
            raise ValueError(
                "arrays of token ids are not taken; send text (LangChain: check_embedding_ctx_length=False)"
            )
        if isinstance(value, list) and not 1 <= len(value) <= MAX_INPUTS:
            raise ValueError(f"must hold 1 to {MAX_INPUTS} items")
        return value if isinstance(value, list) else [value]


class EmbeddingUsage(Usage):
    """Tokens, and which texts were cut."""

    truncated: list[int] = Field(default=[])
    """Positions of the inputs that are texts with more tokens than the model reads: their vectors are of the beginning.
    Left out where there are none."""


class Embedding(ResponseBody):
    """One vector of unit length."""

    object: Literal["embedding"]
    index: int
    """Position of the input."""
    embedding: VectorBody
    """float32 numbers; with `encoding_format: base64` their little-endian bytes in base64."""
    space: str
    """Digest of the vector's embedding space, of images or of texts. Keep it beside a vector that you store."""


class EmbeddingList(ResponseBody):
    """Vectors in the order of the inputs, all from one release."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    """`clip@` and the number of the release."""
    usage: EmbeddingUsage


class ModelBody(ResponseBody):
    """A name that requests may use, and the release behind it."""

    id: str
    object: Literal["model"]
    created: int
    """Always 0: see `/v1/releases` for times."""
    owned_by: str
    family: Family
    release: int
    adapter: str
    """The adapter's name; `base`: the base alone."""
    image_space: str | None = None
    """Digest of the image embedding space; of a CLIP."""
    text_space: str | None = None
    """Digest of the text embedding space; of a CLIP."""
    dimensions: int | None = None
    """Length of a vector; of a CLIP."""


class ModelList(ResponseBody):
    """The live release first, then the other resident ones."""

    object: Literal["list"]
    data: list[ModelBody]


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
    of one release by dot product. To compare with image vectors of an earlier release, send their `space`: the answer
    is of a release that has it, or 409 `space_gone`.
    """
    state = app_state(request)
    body, inputs = await read_inputs(request, state)
    user = body.user or body.safety_identifier
    texts = {index: each for index, each in enumerate(inputs) if isinstance(each, str)}
    state.check_texts(list(texts.values()), "input", places=list(texts))
    async with state.answering(request, body.model, user=user, space=body.space) as (snapshot, deadline):
        await state.calibrations.check_length(body.dimensions, snapshot, state.dim)
        embedded = await embed(state, snapshot, inputs, deadline, caller_of(request.scope), body.truncate)
        rows = shortened(embedded.rows, body.dimensions)
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": encoded(row, body.encoding_format),
                "space": snapshot.text_space if isinstance(each, str) else snapshot.image_space,
            }
            for index, (each, row) in enumerate(zip(inputs, rows, strict=True))
        ]
        usage: dict[str, Any] = {"prompt_tokens": embedded.tokens, "total_tokens": embedded.tokens}
        if embedded.cut:
            usage["truncated"] = embedded.cut
        answer = {"object": "list", "data": data, "model": f"clip@{snapshot.release}", "usage": usage}
        return json_response(answer, state.headers(request, "embeddings", snapshot) | embedded.headers)


async def read_inputs(request: Request, state: AppState) -> tuple[EmbeddingsRequest, list[Input]]:
    """The checked body, and the inputs in their order. Raises ApiError."""
    parts = await read_parts(request, IMAGES_PER_REQUEST)
    if parts is None:
        body = await json_body(request, EmbeddingsRequest)
        return body, [as_input(f"input.{index}", item) for index, item in enumerate(body.input)]
    inputs: list[Input] = []
    others: list[FormField] = []
    for name, value in parts:
        if isinstance(value, str) and name not in INPUT_NAMES:
            others.append((name, value))
        elif name in INPUT_NAMES or not name:
            inputs.append(value if isinstance(value, str) else (f"input.{len(inputs)}", value))
        else:
            raise field_error(name[:80], "files go into the field 'input'.", "unknown_field")
    texts = [each if isinstance(each, str) else "an image" for each in inputs]
    return checked(EmbeddingsRequest, {**fields_of(others, set()), "input": texts}), inputs


def as_input(place: str, item: Item) -> Input:
    """A text; or an image's place and source."""
    if isinstance(item, str):
        return item
    if isinstance(item, TextItem):
        return item.text
    if isinstance(item, ImageUrlItem):
        return f"{place}.image_url", item.image_url.url
    return f"{place}.image", item.image


async def embed(
    state: AppState, snapshot: ReleaseSnapshot, inputs: list[Input], deadline: float, caller: str,
    truncate: bool = True, name: Callable[[int], str] = "input.{}".format,
) -> Vectors:  # fmt: skip
    """Vectors of texts and images in their order. ``name``: of the input at a position, in errors."""
    texts = {index: each for index, each in enumerate(inputs) if isinstance(each, str)}
    images = {index: each for index, each in enumerate(inputs) if not isinstance(each, str)}
    whole = () if truncate else list(map(name, texts))
    kinds = []
    if images:
        kinds.append((list(images), state.vectors.of_images(list(images.values()), snapshot, deadline, caller)))
    if texts:
        kinds.append((list(texts), state.vectors.of_texts(list(texts.values()), snapshot, deadline, caller, whole)))
    answers = await gathered(answer for _, answer in kinds)
    vectors = np.zeros((len(inputs), state.dim), np.float32)
    for (places, _), answer in zip(kinds, answers, strict=True):
        vectors[places] = answer.rows
    last, places = answers[-1], kinds[-1][0]  # of the texts, if any
    cut = tuple(places[each] for each in last.cut)
    return Vectors(vectors, last.logit_scale, last.tokens, cut)


def encoded(row: npt.NDArray[np.float32], how: str) -> Any:
    """One vector for :func:`json_response`: base64 of little-endian float32, or the array itself."""
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
    snapshot = state.admission.resolve(name, family)
    spaces = {"image_space": snapshot.image_space, "text_space": snapshot.text_space, "dimensions": state.dim}
    return {
        "id": name, "object": "model", "created": 0, "owned_by": "ratchet", "family": family,
        "release": snapshot.release, "adapter": snapshot.shown(family), **(spaces if family == CLIP else {}),
    }  # fmt: skip
