"""GET /v1/spaces: the embedding spaces that requests may name, and how long each stays."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

import pybase64
from fastapi import APIRouter, Path, Request, Response
from pydantic import Field

from core.errors import AdapterError, LedgerError
from core.ledger import Ledger
from serving.engines.bridge import bridge_key, parse_bridge
from serving.errors import NotReady
from serving.http.app_state import app_state
from serving.http.bodies import ResponseBody, json_response
from serving.http.errors import ApiError, missing

router = APIRouter(tags=["OpenAI compatible"])
Space = Annotated[str, Path(max_length=64, json_schema_extra={"format": "space"})]


class BridgeMeasure(ResponseBody):
    """The gate's measurement of a bridge on one half of its held-out images; it was fitted on the other half."""

    n: int
    """Texts."""
    old_old: float
    """Recall of the incumbent's texts in its own images, of that half."""
    recall: float
    """Of this release's texts in the incumbent's images, mapped."""
    ci_low: float
    """One-sided lower bound of `recall` minus `old_old`."""
    allowed: bool
    """Whether a loss of more than `margin` is excluded; only then is it offered."""


class CrossVersionBody(ResponseBody):
    """What the gate measured: recall of texts in images over its retrieval suites, when the release was a candidate."""

    incumbent: str
    """The adapter whose image vectors it was compared with; `base`: the base alone."""
    k: int
    n: int
    """Texts."""
    old_old: float
    """The incumbent's texts in its own images."""
    new_old: float
    """This release's texts in the incumbent's images."""
    new_new: float
    ci_low: float
    """One-sided lower bound of `new_old` minus `old_old`."""
    margin: float
    allowed: bool
    """Whether a loss of more than `margin` is excluded."""
    bridge: BridgeMeasure | None = None
    """Null where too few images could judge one."""


class BridgeBody(ResponseBody):
    """Multiply kept image vectors, a row each, by the matrix, and compare them with texts and images of `to`."""

    space: str
    to: str
    dimensions: int
    matrix: str = Field(json_schema_extra={"contentEncoding": "base64"})
    """Little-endian float32 numbers, row by row."""


class SpaceBody(ResponseBody):
    """An embedding space: vectors of one image space, and texts of a release that has it, may be compared."""

    id: str
    kind: Literal["image", "text"]
    dimensions: int
    preprocessing: dict[str, Any] | None
    """Of images; null for texts."""
    releases: list[int]
    """Resident ones that have it, the newest first."""
    live: bool
    """Whether the newest release has it."""
    releases_left: int
    """It stays at least until so many further releases are live; an operator may also go back to one that has it."""
    cross_version: CrossVersionBody | None
    """Of the newest release that has this image space; null where the gate measured none."""


class SpaceList(ResponseBody):
    """Embedding spaces, those of the newest release first."""

    object: Literal["list"]
    data: list[SpaceBody]


@router.get("/v1/spaces", summary="Embedding spaces that requests may name", response_model=SpaceList)
async def spaces(request: Request) -> Response:
    """A request with `space` is answered by the newest release that has it. A release that changes a tower changes its
    space: vectors that were kept from before may then be compared only with vectors of that earlier space.
    """
    state = app_state(request)
    window = state.admission.window
    if not window:
        raise NotReady("no release is live yet.", "Wait until /health/ready answers 200.")
    rows: dict[str, dict[str, Any]] = {}
    for place, snapshot in enumerate(window):
        for kind, space in zip(("image", "text"), snapshot.spaces, strict=True):
            images = kind == "image"
            row = rows.setdefault(space, {
                "id": space, "kind": kind, "dimensions": state.dim,
                "preprocessing": state.image_loader.preprocess.to_json() if images else None, "releases": [],
                "live": not place, "releases_left": max(1, state.settings.rollback_window - place),
                "cross_version": await asyncio.to_thread(_measured, state.ledger, snapshot.clip) if images else None,
            })  # fmt: skip
            row["releases"].append(snapshot.release)
    return json_response({"object": "list", "data": list(rows.values())})


@router.get(
    "/v1/spaces/{space}/bridge", summary="A map of kept image vectors into the live image space",
    response_model=BridgeBody, responses=missing("The gate offers no bridge between these spaces."),
)  # fmt: skip
async def bridge(request: Request, space: Space) -> Response:
    """Offered from the image space before the newest release, if the gate has shown that searches over it lose at most
    its margin. Embedding the images again is better where it can be done: `cross_version` of `/v1/spaces` has both.
    """
    state = app_state(request)
    with state.admit(request, "clip") as live:
        try:
            if not (space.isascii() and space.isalnum()):
                raise AdapterError(f"{space!r} is no space.", "See GET /v1/spaces.")
            matrix = parse_bridge(await state.calibrations.read(bridge_key(space, live.image_space)))
        except AdapterError:
            measured = (await asyncio.to_thread(_measured, state.ledger, live.clip) or {}).get("bridge")
            problem = f"there is no bridge from {space} to {live.image_space}, the live image space"
            if measured:
                shares = f"{measured['recall']:.1%} of {measured['old_old']:.1%}"
                problem += f": for one from the release before, its recall would be {shares}"
            raise ApiError(404, f"{problem}. Embed the images again.", param="space", code="no_bridge") from None
        return json_response({
            "space": space, "to": live.image_space, "dimensions": len(matrix),
            "matrix": pybase64.b64encode_as_string(matrix.astype("<f4", copy=False).tobytes()),
        })  # fmt: skip


def _measured(ledger: Ledger, clip: str | None) -> dict[str, Any] | None:
    """The gate's measurement of an adapter; None without one, or while the ledger is away."""
    try:
        found = ledger.cross_version(clip)
    except LedgerError:
        return None
    return found and {**found, "incumbent": found["incumbent"] or "base"}
