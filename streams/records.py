"""What a sample is, and the record schema that carries one (``ratchet.sample.v1``).

A record is a JSON object of the fields of :class:`Sample`, with the image as base64 (or a ``data:`` URI) in ``image``,
or as the place to fetch it from in ``image_uri``; or it is the bytes of the image, with the other fields in Kafka
headers. :mod:`streams.codecs` reads and writes both.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cached_property
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from ops.digests import digest_bytes
from ops.errors import RecordError

SCHEMA: Final = "ratchet.sample.v1"

Reason = Literal[
    "empty",
    "not_json",
    "schema",
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

    @field_validator("time")
    @classmethod
    def _utc(cls, value: datetime | None) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)

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
        raise RecordError(
            "text_missing",
            "the record has neither a text nor a question with its answer.",
            "Describe the image in `text`, or give both `question` and `answer`.",
        )
    return sample


def check_text(sample: Sample, max_chars: int) -> None:
    """Raise RecordError ``text_too_long`` when text, question or answer is longer than ``max_chars``."""
    for name in ("text", "question", "answer"):
        length = len(getattr(sample, name))
        if length > max_chars:
            raise RecordError(
                "text_too_long", f"`{name}` has {length} characters, more than {max_chars}.", "Shorten it."
            )
