"""Bodies of requests, checked before anything is computed. Unknown fields are refused."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    StringConstraints,
    Tag,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from core.ledger.rows import Family
from serving.http.json_bodies import OpenAIBody
from serving.releases.types import BASE, Adapters

Reason = Annotated[
    str,
    StringConstraints(min_length=1, max_length=1000, strip_whitespace=True),
    Field(description="Why; goes into the audit log."),
]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Choice = Annotated[Name, StringConstraints(strip_whitespace=True)]
Source = Annotated[str, StringConstraints(min_length=1, max_length=2048)]
MODEL = Field(
    "clip", max_length=200, description="`clip` (what is live), `clip@12` (a resident release), or a resident adapter.",
    json_schema_extra={"format": "model"},
)  # fmt: skip
VLM_MODEL = Field(
    "vlm", max_length=200, description="`vlm` (what is live), `vlm@12` (a resident release), or a resident adapter.",
    json_schema_extra={"format": "model"},
)  # fmt: skip
MAX_INPUTS = 8192
TRUNCATE = Field(
    True,
    description="Whether a text that is longer than the model reads is cut; `x-ratchet-truncated` then counts such "
    "texts. With false it is refused.",
)
Picture = Annotated[str, Field(json_schema_extra={"format": "uri"})]
"""A data URI, or a URL where the server fetches them."""


def in_range(value: datetime | None) -> datetime | None:
    """Refuse a time that not every store can hold."""
    if value is not None and not 1900 <= value.year <= 2200:
        raise ValueError("must be between the years 1900 and 2200")
    return value


class Body(BaseModel):
    """A JSON object without unknown fields."""

    model_config = ConfigDict(extra="forbid")


class ImageUrl(OpenAIBody, Body):
    """OpenAI's way to send an image."""

    url: Picture = Field(description="data:image/png;base64,... or a URL, where the server fetches them.")
    detail: str | None = None


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
    """The tag of what an input is meant to be, so that one error says what is wrong with it; None: nothing known."""
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
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"model": "clip", "input": ["a photo of a cat", "a red circle"]},
                {"model": "clip", "input": [{"image": "data:image/png;base64,iVBORw0KGgo..."}]},
            ]
        },
    )
    input: Annotated[list[Item], FailFast()] = Field(description="A text, an image object, or a list of them.")
    model: str = MODEL
    encoding_format: Literal["float", "base64"] = Field("float", description="base64 is little-endian float32.")
    dimensions: int | None = Field(None, description="Only the model's own dimension is taken.")
    truncate: bool = TRUNCATE
    user: str | None = Field(
        None, max_length=200, description="Who asks: while a canary is live, one user is always answered by one side."
    )

    @field_validator("input", mode="before", json_schema_input_type=Item | list[Item])
    @classmethod
    def listed(cls, value: Any) -> Any:
        """One input as a list of one. Token ids of another model's tokenizer mean nothing here."""
        first = value[0] if isinstance(value, list) and value else value
        inner = first[0] if isinstance(first, list) and first else first
        if isinstance(inner, int | float) and not isinstance(inner, bool):
            raise ValueError(
                "arrays of token ids are not taken; send text (LangChain: check_embedding_ctx_length=False)"
            )
        if isinstance(value, list) and not 1 <= len(value) <= MAX_INPUTS:
            raise ValueError(f"must hold 1 to {MAX_INPUTS} items")
        return value if isinstance(value, list) else [value]


class ClassifyRequest(Body):
    """Classification: which of these labels fits each image, or which class of a head that the release has learned."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"images": ["data:image/png;base64,iVBORw0KGgo..."], "labels": ["cat", "dog"],
                 "templates": ["a photo of a {}."]},
                {"images": ["data:image/png;base64,iVBORw0KGgo..."], "head": "garments", "confidence": 0.5},
            ],
            "oneOf": [{"required": ["labels"]}, {"required": ["head"]}],
            "dependentRequired": {"multi_label": ["head"], "confidence": ["head"]},
        },
    )  # fmt: skip
    images: Annotated[list[Picture], FailFast()] = Field(min_length=1, description="Data URIs, or URLs.")
    labels: Annotated[list[Name], FailFast()] = Field([], min_length=1, description="What it may be.")
    templates: Annotated[list[Name], FailFast()] = Field(
        ["{}"], min_length=1, max_length=100, description="Texts with `{}` for the label."
    )
    head: str = Field("", min_length=1, max_length=64, description="A head of the release, in place of labels.")
    multi_label: bool = Field(False, description="With a head: all classes that have the probability `confidence`.")
    confidence: float | None = Field(
        None, ge=0, le=1, description="With a head: a label needs this probability; else a level above it, or none."
    )
    truncate: bool = TRUNCATE
    model: str = MODEL

    @model_validator(mode="after")
    def one_way(self) -> Self:
        """Labels, or a head."""
        if bool(self.labels) == bool(self.head):
            raise PydanticCustomError("one_way", "give labels, or the name of a head", {"param": "labels"})
        if not self.head and (self.multi_label or self.confidence is not None):
            raise ValueError("multi_label and confidence are of a head")
        return self

    @field_validator("labels")
    @classmethod
    def distinct(cls, value: list[str]) -> list[str]:
        """The same label twice would share its probability, and be shown once."""
        if len(set(value)) < len(value):
            raise ValueError("must differ from each other")
        return value

    @field_validator("templates")
    @classmethod
    def with_a_place(cls, value: list[str]) -> list[str]:
        """Each template has exactly one place for the label."""
        for template in value:
            if template.count("{}") != 1:
                raise ValueError("each template needs exactly one {} for the label")
        return value


class VqaRequest(Body):
    """One question about one image."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"image": "data:image/png;base64,iVBORw0KGgo...", "question": "what colour is the bus?"},
                {"image": "data:image/png;base64,iVBORw0KGgo...", "question": "is this a shoe?",
                 "choices": ["yes", "no"]},
            ]
        },
    )  # fmt: skip
    image: Picture = Field(description="A data URI, or a URL.")
    question: str = Field(min_length=1, description="What to ask.")
    choices: Annotated[list[Choice], Field(fail_fast=True)] | None = Field(
        None, min_length=2, max_length=16, description="The answers to choose from; unset: the model's own words."
    )
    model: str = VLM_MODEL

    @field_validator("choices")
    @classmethod
    def distinct(cls, value: list[str] | None) -> list[str] | None:
        """The same choice twice would share its probability."""
        if value is not None and len(set(value)) < len(value):
            raise ValueError("must differ from each other")
        return value


class SearchRequest(Body):
    """Find accepted samples by a text or by an image."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"text": "a red dragon", "k": 5, "domain": ["pixel_ultica"]}]}
    )
    text: str | None = Field(None, min_length=1, description="What to look for; or `image`.")
    image: Picture | None = Field(None, description="A data URI, or a URL; or `text`.")
    k: int = Field(10, ge=1, le=100, description="How many hits.")
    domain: Annotated[list[Name], FailFast()] = Field([], max_length=50, description="Only these domains.")
    source: Annotated[list[Source], FailFast()] = Field([], max_length=50, description="Only these sources.")
    since: datetime | None = Field(None, description="Sample time, UTC, included.")
    until: datetime | None = Field(None, description="Sample time, UTC, not included.")
    truncate: bool = TRUNCATE
    model: str = MODEL

    _in_range = field_validator("since", "until")(in_range)


class ReleaseRequest(Body):
    """Release adapters that the ledger knows. A family that is not named keeps what is live; null is the base alone."""

    clip: str | None = Field(None, max_length=200, description="CLIP adapter; null or `base`: the base alone.")
    vlm: str | None = Field(None, max_length=200, description="VLM adapter; null or `base`: the base alone.")
    reason: Reason
    expected_live: int | None = Field(None, ge=0, lt=2**63, description="Refuse (409) when another release is live.")
    share: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Of the requests: 1 all, 0.1 a canary for a tenth, 0 a shadow that answers no client.",
    )
    force: bool = Field(False, description="Also adapters that no gate passed and that were never live.")

    @model_validator(mode="after")
    def names_one(self) -> ReleaseRequest:
        """At least one family is named."""
        if not self.model_fields_set & {"clip", "vlm"}:
            raise ValueError("name `clip`, `vlm`, or both")
        return self

    def adapters(self) -> Adapters:
        """What is to be released, by family."""
        named: Adapters = {"clip": self.clip, "vlm": self.vlm}
        return {f: None if name == BASE else name for f, name in named.items() if f in self.model_fields_set}


class RollbackRequest(Body):
    """Go back: to the newest release with another adapter, or to release `to`; one family's adapter, or both."""

    reason: Reason
    to: int | None = Field(
        None, ge=1, lt=2**63, description="Number of the release to go back to; unset: the one before."
    )
    family: Family | None = Field(None, description="`clip` or `vlm`: the other one stays what is live.")
    expected_live: int | None = Field(None, ge=0, lt=2**63, description="Refuse (409) when another release is live.")


class PromoteRequest(Body):
    """Let the canary or shadow that is live answer everybody."""

    reason: Reason
    expected_live: int | None = Field(None, ge=0, lt=2**63, description="Refuse (409) when another release is live.")


class ReasonRequest(Body):
    """Why."""

    reason: Reason


class RefusedSelection(Body):
    """Which refused records, the oldest first. Without any field: all."""

    reason: str | None = Field(None, max_length=40, description="Only those refused for it.")
    source: str | None = Field(None, max_length=256, description="Only those of this source; empty: of none known.")
    since: datetime | None = Field(None, description="Refused at or after this time, UTC.")
    limit: int = Field(100, ge=1, le=500, description="At most so many, of those that were not sent again before.")

    _in_range = field_validator("since")(in_range)


class ResubmitRequest(Body):
    """A refused record to send again; or many, by a filter."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"place": "ratchet.samples:0:42", "reason": "the image is there now"},
                {"filter": {"reason": "uri_unreachable", "limit": 100}, "reason": "the image server is back"},
            ]
        },
    )
    place: str | None = Field(
        None, min_length=1, max_length=300, description="`topic:partition:offset`, as the list names it; or `filter`."
    )
    filter: RefusedSelection | None = Field(None, description="Which records; or `place`.")
    reason: Reason
    force: bool = Field(False, description="With `place`: also when it was sent again before.")
    dry_run: bool = Field(False, description="With `filter`: say how many, and send none.")

    @model_validator(mode="after")
    def names_one(self) -> ResubmitRequest:
        """A place or a filter, and what goes with it."""
        if (self.place is None) == (self.filter is None):
            raise ValueError("give `place` or `filter`")
        if (self.force and self.place is None) or (self.dry_run and self.filter is None):
            raise ValueError("`force` goes with `place`, `dry_run` with `filter`")
        return self


class SampleSelector(Body):
    """What is to be deleted. All that is named has to hold, and one field beside `before` is named."""

    id: str | None = Field(None, min_length=1, max_length=64, description="A sample's id, 64 hex digits.")
    source: Source | None = Field(None, description="As producers state it; also of refused records.")
    domain: Source | None = Field(None, description="As producers state it.")
    concept: Source | None = Field(None, description="What is depicted, as producers state it.")
    label: Source | None = Field(None, description="The class, as producers state it.")
    key: str | None = Field(None, min_length=1, max_length=4096, description="The record's key, in hex.")
    record: str | None = Field(None, min_length=1, max_length=300, description="`topic:partition:offset`.")
    before: datetime | None = Field(None, description="Only what was ingested before this time, UTC.")

    _in_range = field_validator("before")(in_range)

    def fields(self) -> dict[str, str]:
        """Those that are given, as :mod:`streams.store.deletion` takes them."""
        given = self.model_dump(exclude_none=True)
        return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in given.items()}


class DeletionRequest(Body):
    """Samples and refused records to delete."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"selector": {"source": "crawler-7"}, "reason": "consent withdrawn"}]},
    )
    selector: SampleSelector = Field(description="What is to be deleted.")
    reason: Reason
    dry_run: bool = Field(False, description="Say how much is selected now, and delete nothing.")
