"""What a sample is, and the record schema that carries one (``ratchet.sample.v1``).

A record is a JSON object of the fields of :class:`Sample`, with the image as base64 (or a ``data:`` URI) in ``image``,
or as the place to fetch it from in ``image_uri``; or it is the bytes of the image, with the other fields in Kafka
headers. :mod:`streams.codecs` reads and writes both.

A schema version ``ratchet.sample.v1.N`` only adds fields, so every one of them is read; what this version does not know
of it goes into ``extra``. ``ratchet.sample.v2`` would change what a field means, and is refused.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import cached_property
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError, field_validator

from ops.digests import digest_bytes
from ops.errors import RecordError
from streams.extra import check_extra, dump_extra

SCHEMA: Final = "ratchet.sample.v1"
_VERSIONS: Final = re.compile(r"ratchet\.sample\.v1(\.[0-9]{1,9})?")

Reason = Literal[
    "empty",
    "not_json",
    "schema",
    "schema_unavailable",
    "headers",
    "image_missing",
    "image_too_large",
    "image_too_many_pixels",
    "image_too_small",
    "image_format",
    "image_undecodable",
    "text_missing",
    "text_too_long",
    "uri_not_allowed",
    "uri_unreachable",
    "uri_digest",
    "corrupt",
    "crashed",
    "internal",
]
#: Why a record may be refused: the labels of the quarantine metric and the ``ratchet_reason`` header. Stable names.
REASONS: Final[frozenset[str]] = frozenset(get_args(Reason))

Name = Annotated[str, StringConstraints(max_length=256)]
Tag = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^;]+$")]


class Sample(BaseModel):
    """One image with a text, or with a question and its answer. Strings are empty where there is no value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: bytes = Field(repr=False)
    """The encoded image, as it came."""
    text: str = ""
    question: str = ""
    answer: str = ""
    domain: Name = ""
    source: Annotated[str, StringConstraints(max_length=2048)] = ""
    """Where it is from: a URI or a name."""
    time: datetime | None = None
    """When it came to be (UTC); ingest takes the record's time where it is None."""
    tags: Annotated[tuple[Tag, ...], Field(max_length=32)] = ()
    concept: Name = ""
    label: Name = ""
    extra: dict[str, JsonValue] = Field(default_factory=dict)
    """Fields that this version does not know; see :mod:`streams.extra` for their bounds."""

    @field_validator("time")
    @classmethod
    def _utc(cls, value: datetime | None) -> datetime | None:
        if value is None:
            return None
        try:
            return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
        except OverflowError:  # the first and the last day of the calendar, in a zone that is not UTC
            raise ValueError("the time is out of range") from None

    @field_validator("extra", mode="before")
    @classmethod
    def _bounded(cls, value: Any) -> Any:
        return check_extra(value)

    @field_validator("text", "question", "answer", "domain", "source", "concept", "label", "tags")
    @classmethod
    def _encodable(cls, value: Any) -> Any:
        for text in value if isinstance(value, tuple) else (value,):
            text.encode()  # JSON can hold halves of surrogate pairs, which are no text: UnicodeEncodeError
        return value

    @field_validator("tags", mode="before")
    @classmethod
    def _split_tags(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(";") if part.strip())
        return value

    @cached_property
    def id(self) -> str:
        """SHA-256 of what is learned from: image, text, question, answer. 64 hex digits. Metadata does not count."""
        texts = (part.encode() for part in (self.text, self.question, self.answer))
        return digest_bytes(self.image, *texts)

    def __hash__(self) -> int:
        return hash(self.id)

    def row(self) -> dict[str, Any]:
        """Columns of the sample store that come from the sample; ``extra`` as JSON text, empty where there is none."""
        return {**self.model_dump(exclude={"extra"}), "tags": list(self.tags), "extra": dump_extra(self.extra)}


#: The fields of a record that are not the image.
METADATA: Final = tuple(name for name in Sample.model_fields if name != "image")


def make_sample(fields: dict[str, Any]) -> Sample:
    """A checked sample. Raises RecordError ``schema`` (naming the field), ``image_missing`` or ``text_missing``."""
    if not fields.get("image"):
        raise RecordError("image_missing", "the record has no image.", "Give `image` or `image_uri`.")
    try:
        sample = Sample(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise RecordError(
            "schema",
            f"field {name!r} of the record is not valid: {first['msg']}.",
            f"The fields of {SCHEMA} are: image or image_uri, {', '.join(METADATA)}.",
        ) from None
    if not sample.text and not (sample.question and sample.answer):
        unknown = f" It has unknown fields: {', '.join(map(repr, sample.extra))[:200]}." if sample.extra else ""
        raise RecordError(
            "text_missing",
            f"the record has neither a text nor a question with its answer.{unknown}",
            "Describe the image in `text`, or give both `question` and `answer`.",
        )
    return sample


def check_schema(name: object) -> None:
    """Raise RecordError ``schema`` unless ``name`` is ``ratchet.sample.v1``, with or without a minor version."""
    if not (isinstance(name, str) and _VERSIONS.fullmatch(name)):
        raise RecordError("schema", f"schema {str(name)[:80]!r} is not known.", f"Use {SCHEMA!r}.")


def check_text(sample: Sample, max_chars: int) -> None:
    """Raise RecordError ``text_too_long`` when text, question or answer is longer than ``max_chars``."""
    for name in ("text", "question", "answer"):
        length = len(getattr(sample, name))
        if length > max_chars:
            raise RecordError(
                "text_too_long", f"`{name}` has {length} characters, more than {max_chars}.", "Shorten it."
            )
