"""Bodies of requests and answers: how they are read and checked, and schemas that routes share. A request is JSON, a
form whose images are files, or one image with the other fields in the query. Answers are named as ``response_model``
but returned as a ready ``Response``, without a second validation or copy; an integration test checks them. Pydantic
parses a data URI in half of orjson's time; orjson writes a numpy array 20 times as fast as the standard library."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from starlette.datastructures import UploadFile

from serving.http.errors import ApiError, field_error, from_validation

Model = TypeVar("Model", bound=BaseModel)
MAX_MARKS = 40_000
"""Most commas and opening brackets outside of texts in a body. The longest list of inputs has 8192 items, and OpenAI's
image objects (``{"type": ..., "image_url": {"url": ...}}``) take four. A body of 16 MiB may hold eight million."""
MAX_FIELDS = 1000
FORM = "multipart/form-data"
IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp", "image/gif")
"""As the schema shows them. Any ``image/...`` is accepted: the first bytes tell the format."""
FormField = tuple[str, str | bytes]
"""The name of a field, and its text or the bytes of its file."""
SampleId = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Reason = Annotated[
    str,
    StringConstraints(min_length=1, max_length=1000, strip_whitespace=True),
    Field(description="Reason, for the audit log."),
]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Source = Annotated[str, StringConstraints(min_length=1, max_length=2048)]
MODEL = Field(
    "clip", max_length=200, description="`clip` (what is live), `clip@12` (a resident release), or a resident adapter.",
    json_schema_extra={"format": "model"},
)  # fmt: skip
VLM_MODEL = Field(
    "vlm", max_length=200, description="`vlm` (what is live), `vlm@12` (a resident release), or a resident adapter.",
    json_schema_extra={"format": "model"},
)  # fmt: skip
SPACE = Field(
    None, min_length=1, max_length=64,
    description="An embedding space (`x-ratchet-image-space` or `x-ratchet-text-space` of an earlier answer) that the "
    "release must have: vectors of another one are never answered. 409 `space_gone` if no resident release has it.",
    json_schema_extra={"format": "space"},
)  # fmt: skip
TRUNCATE = Field(
    True,
    description="Whether a text that is longer than the model reads is cut; `x-ratchet-truncated` then counts such "
    "texts. With false it is refused.",
)
Picture = Annotated[str, Field(json_schema_extra={"format": "uri"})]
"""A data URI, or a URL where the server fetches them."""


class Body(BaseModel):
    """A JSON object without unknown fields."""

    model_config = ConfigDict(extra="forbid")


class OpenAIBody(BaseModel):
    """An object in which null means the default, also for fields that this server does not know: OpenAI's API says so
    for each optional field, and clients rely on it (LiteLLM sends ``"encoding_format": null``)."""

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, value: Any) -> Any:
        return {name: each for name, each in value.items() if each is not None} if isinstance(value, dict) else value


class ImageUrl(OpenAIBody, Body):
    """OpenAI's way to send an image."""

    url: Picture = Field(description="data:image/png;base64,... or a URL, if the server fetches them.")
    detail: str | None = None


class ResponseBody(BaseModel):
    """An object of an answer. A field's docstring is its description in the schema. Fields without a default are always
    there; others may be left out."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Usage(ResponseBody):
    """Tokens, as OpenAI counts them. An image counts no tokens for the CLIP."""

    prompt_tokens: int
    total_tokens: int


class ChatUsage(Usage):
    """Tokens of a prompt, images included, and of its answer."""

    completion_tokens: int


def in_range(value: datetime | None) -> datetime | None:
    """Reject a time that not every store can hold."""
    if value is not None and not 1900 <= value.year <= 2200:
        raise ValueError("must be between the years 1900 and 2200")
    return value


def distinct(value: list[str] | None) -> list[str] | None:
    """Reject repeated answers to choose from, which would share their probability."""
    if value is not None and len(set(value)) < len(value):
        raise ValueError("must differ from each other")
    return value


def is_empty(value: Any) -> bool:
    """True for null, an empty text, list or object, or an object of nulls."""
    if isinstance(value, dict):
        return all(each is None for each in value.values())
    return value is None or value in ("", [])


async def read_body(
    request: Request, model: type[Model], field: str, lists: set[str], max_files: int
) -> tuple[Model, list[bytes]]:
    """Read a body of any kind as the JSON form's model, and the images that came as bytes (none in JSON). ``field``: of
    the images; in a form or an image body for files only. ``lists``: fields that are repeated, or one JSON list. Raises
    ApiError when the body is broken, has too many parts, or does not fit the model."""
    parts = await read_parts(request, max_files)
    if parts is None:
        return await json_body(request, model), []
    files = [(name, value) for name, value in parts if isinstance(value, bytes)]
    for name, _ in files:
        if name and name.removesuffix("[]") not in (field, field.removesuffix("s")):
            raise field_error(name[:80], f"files go into the field {field!r}.", "unknown_field")
    fields = fields_of(parts, lists)
    if field.endswith("s"):
        fields[field] = ["upload"] * len(files)
    elif files:
        fields[field] = "upload"
    return checked(model, fields), [data for _, data in files]


async def read_parts(request: Request, max_files: int) -> list[FormField] | None:
    """Fields and files in their order; None for a body that is neither a form nor an image. An image body is a file
    without a name, after the fields of the query."""
    kind = media_type(request)
    if kind.startswith("image/"):
        return [*request.query_params.multi_items(), ("", await request.body())]
    if kind != FORM:
        return None
    async with request.form(max_files=max_files, max_fields=MAX_FIELDS) as form:
        return [
            (name, await value.read() if isinstance(value, UploadFile) else value) for name, value in form.multi_items()
        ]


def fields_of(parts: Iterable[FormField], lists: set[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in parts:
        if isinstance(value, bytes):
            continue
        if name in lists:
            fields.setdefault(name, []).extend(_listed(value))
        else:
            fields[name] = value
    return fields


def _listed(value: str) -> list[str]:
    if value.startswith("["):
        check_marks(value.encode("utf-8", "surrogatepass"))
        try:
            parts = json.loads(value)
        except (ValueError, RecursionError):
            return [value]
        if isinstance(parts, list) and all(isinstance(part, str) for part in parts):
            return parts
    return [value]


def body_schemas(model: type[BaseModel], field: str, form_field: dict[str, Any] | None = None) -> dict[str, Any]:
    """``openapi_extra`` of a route that takes JSON, a form, or an image. ``field``: of the images. ``form_field``: its
    schema in a form; by default one file, or a list of files where the model has a list."""
    schema = inline(model)
    flat = {name: each for name, each in schema["properties"].items() if not _is_nested(each)}
    file = {"type": "string", "format": "binary"}
    many = schema["properties"][field].get("type") == "array"
    in_form = form_field or ({"type": "array", "items": file, "minItems": 1} if many else file)
    properties = {**flat, field: in_form}
    form = {key: value for key, value in schema.items() if key != "examples"} | {"properties": properties}
    content = {
        "application/json": {"schema": schema},
        FORM: {"schema": form},
        **{kind: {"schema": file} for kind in IMAGE_TYPES},
    }
    query = [
        {"name": name, "in": "query", "required": False, "schema": _not_null(each),
         "description": f"Where the body is an image. {each.get('description', '')}".strip()}
        for name, each in flat.items() if name != field
    ]  # fmt: skip
    return {"parameters": query, "requestBody": {"required": True, "content": content}}


def _is_nested(schema: dict[str, Any]) -> bool:
    """True for a list of objects, which neither a form nor a query can hold."""
    return any(each.get("items", {}).get("type") == "object" for each in schema.get("anyOf", [schema]))


def _not_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without null, which a query does not have."""
    kinds = [each for each in schema.get("anyOf", ()) if each.get("type") != "null"]
    rest = {key: value for key, value in schema.items() if key not in ("anyOf", "default", "description", "title")}
    return {**rest, **kinds[0]} if len(kinds) == 1 else {**rest, **({"anyOf": kinds} if kinds else {})}


def media_type(request: Request) -> str:
    """The content type in lower case without parameters; JSON by default."""
    return request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()


async def json_body(request: Request, model: type[Model]) -> Model:
    """Read and check a JSON body. Raises ApiError naming the first problem."""
    kind = media_type(request)
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, f"content type {kind[:80]!r} is not taken here; send application/json.", code="media_type")
    data = await request.body()
    check_marks(data)
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise from_validation(error) from None


def check_marks(data: bytes) -> None:
    """Reject JSON of more than :data:`MAX_MARKS` values (ApiError) before it is parsed. Other data may pass: the parser
    stops at the first wrong byte."""
    if not _has_too_many(data):
        return
    strings = 2 * MAX_MARKS + 1  # one after each mark and one after its colon: valid JSON with more has more marks
    if b"\\" in data:
        data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    parts = data.split(b'"', 2 * strings)
    if len(parts) > 2 * strings or _has_too_many(b"".join(parts[::2])):
        raise ApiError(400, f"the body has more than {MAX_MARKS} values.", code="too_many_values")


def _has_too_many(data: bytes) -> bool:
    """Stop early: counting eight million takes 0.1 s, in which no other request is served."""
    found = 0
    for start in range(0, len(data), MAX_MARKS):
        found += sum(data.count(mark, start, start + MAX_MARKS) for mark in (b",", b"[", b"{"))
        if found > MAX_MARKS:
            return True
    return False


def checked(model: type[Model], fields: Any) -> Model:
    """Fields as a model. Raises ApiError naming the first problem."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error) from None


def json_response(content: Any, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer. A float32 has the digits that tell it from its neighbours; NaN and infinity become null."""
    data = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(data, 200, headers, "application/json")


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """``openapi_extra`` for a route that reads its body itself."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": inline(model)}}}}


def inline(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return resolve(definitions[value["$ref"].rsplit("/", 1)[-1]])
            return {key: resolve(child) for key, child in value.items()}
        return [resolve(child) for child in value] if isinstance(value, list) else value

    resolved: dict[str, Any] = resolve(schema)
    return resolved
