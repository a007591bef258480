"""Pictures that a visitor chose: an example or an upload."""

from __future__ import annotations

import base64
import re
from typing import Annotated

from fastapi import APIRouter, Depends, File, Form, UploadFile
from fastapi.responses import Response

from ops.console.request_context import ErrorPage, Reader, RequestContext

router = APIRouter()
SAMPLE = re.compile("[0-9a-f]{64}")
SIZES = (96, 192, 320)
KEEP = {"cache-control": "private, max-age=600"}
"""Limits how long a browser shows a deleted picture."""
NO_PICTURE = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 96 96"><rect width="96" height="96" fill="#8a948e" '
    'fill-opacity=".18"/><path d="M30 62l12-15 9 10 6-7 10 12zM36 36h.1" fill="none" stroke="#8a948e" '
    'stroke-width="4" stroke-linecap="round" stroke-linejoin="round"/><path d="M26 26l44 44" stroke="#8a948e" '
    'stroke-width="4" stroke-linecap="round"/></svg>'
)


@router.get("/samples/{sample_id}.png")
def sample(context: Reader, sample_id: str, size: int = 192) -> Response:
    """A sample's thumbnail, read from the store, so available without the server."""
    if not SAMPLE.fullmatch(sample_id) or size not in SIZES:
        raise ErrorPage(404, "There is no such picture", "", "")
    return drawn(context.data.thumbnail(sample_id, size))


def drawn(png: bytes | None) -> Response:
    """A picture, or a placeholder for none."""
    if png is None:
        return Response(NO_PICTURE, media_type="image/svg+xml")
    return Response(png, media_type="image/png", headers=KEEP)


def chosen(
    context: Reader,
    sample: Annotated[str, Form(max_length=64)] = "",
    upload: Annotated[UploadFile | None, File()] = None,
) -> bytes | None:
    """Bytes of the picture that a form names; an upload takes precedence over an example. None without a picture."""
    if upload is not None and (data := upload.file.read(context.data.settings.serve.max_image_bytes + 1)):
        if len(data) > context.data.settings.serve.max_image_bytes:
            raise ErrorPage(413, "This picture is too large", f"It has {len(data):,} bytes or more.", "Scale it down.")
        return data
    return context.data.picture(sample) if SAMPLE.fullmatch(sample) else None


def needed(context: Reader, picture: Annotated[bytes | None, Depends(chosen)]) -> bytes:
    """The chosen, readable picture. Raises ErrorPage when there is none."""
    if picture is None:
        raise ErrorPage(400, "Choose a picture first", "", "Pick one of the examples, or drop one in.")
    return readable(context, picture)


def readable(context: RequestContext, picture: bytes) -> bytes:
    """The picture itself. Raises ErrorPage when it cannot be decoded."""
    if context.data.draw(picture, 64) is None:
        raise ErrorPage(400, "This picture cannot be read", "", "Use a whole PNG, JPEG, WebP, GIF or BMP file.")
    return picture


def inline(context: RequestContext, picture: bytes) -> str:
    png = context.data.draw(picture, 96) or b""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


Chosen = Annotated[bytes | None, Depends(chosen)]
Picture = Annotated[bytes, Depends(needed)]
