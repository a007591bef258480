"""Bodies that carry images as they are: multipart forms, and one image by itself, whose fields are in the query."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from fastapi import Request
from pydantic import BaseModel
from starlette.datastructures import UploadFile

from serving.http.errors import ApiError
from serving.http.json_bodies import Model, check_marks, checked, inline, json_body, media_type

MAX_FIELDS = 1000
FORM = "multipart/form-data"
IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp", "image/gif")
"""As the schema shows them. Any ``image/...`` is taken: the first bytes say what it is."""
FormField = tuple[str, str | bytes]
"""The name of a field, and its text or the bytes of its file."""


async def read_body(
    request: Request, model: type[Model], field: str, lists: set[str], max_files: int
) -> tuple[Model, list[bytes]]:
    """A body of any kind as the JSON form's model, and the images that came as bytes: none in JSON.

    Args:
        field: of the images. In a form or an image body it is for files only.
        lists: fields that are lists: repeated, or one JSON list.

    Raises:
        ApiError: the body is broken, has too many parts, or does not fit the model.
    """
    parts = await read_parts(request, max_files)
    if parts is None:
        return await json_body(request, model), []
    files = [(name, value) for name, value in parts if isinstance(value, bytes)]
    for name, _ in files:
        if name and name.removesuffix("[]") not in (field, field.removesuffix("s")):
            raise ApiError(
                400, f"{name[:80]}: files go into the field {field!r}.", param=name[:80], code="unknown_field"
            )
    fields = fields_of(parts, lists)
    if field.endswith("s"):
        fields[field] = ["upload"] * len(files)
    elif files:
        fields[field] = "upload"
    return checked(model, fields), [data for _, data in files]


async def read_parts(request: Request, max_files: int) -> list[FormField] | None:
    """Fields and files in their order; None for a body that is neither a form nor an image.

    An image body is a file without a name, after the fields of the query.
    """
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
    """The fields that are no files; those in ``lists`` as lists."""
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
    """``openapi_extra`` of a route that takes JSON, a form, or an image.

    Args:
        field: of the images.
        form_field: its schema in a form; by default one file, or a list of files where the model has a list.
    """
    schema = inline(model)
    file = {"type": "string", "format": "binary"}
    many = schema["properties"][field].get("type") == "array"
    in_form = form_field or ({"type": "array", "items": file, "minItems": 1} if many else file)
    properties = {**schema["properties"], field: in_form}
    form = {key: value for key, value in schema.items() if key != "examples"} | {"properties": properties}
    content = {
        "application/json": {"schema": schema},
        FORM: {"schema": form},
        **{kind: {"schema": file} for kind in IMAGE_TYPES},
    }
    query = [
        {"name": name, "in": "query", "required": False, "schema": _not_null(each),
         "description": f"Where the body is an image. {each.get('description', '')}".strip()}
        for name, each in schema["properties"].items() if name != field
    ]  # fmt: skip
    return {"parameters": query, "requestBody": {"required": True, "content": content}}


def _not_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a value that is given; a query has no null."""
    kinds = [each for each in schema.get("anyOf", ()) if each.get("type") != "null"]
    rest = {key: value for key, value in schema.items() if key not in ("anyOf", "default", "description", "title")}
    return {**rest, **kinds[0]} if len(kinds) == 1 else {**rest, **({"anyOf": kinds} if kinds else {})}
