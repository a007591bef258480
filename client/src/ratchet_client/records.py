"""Samples, and the record schema that carries one (``ratchet.sample.v1``).

A record is a JSON object of the fields of :class:`Sample`, with the image as base64 (or a ``data:`` URI) in ``image``,
or as the place to fetch it from in ``image_uri``; or it is the bytes of the image, with the other fields in Kafka
headers. :mod:`ratchet_client.encoding` writes both, and the server's :mod:`streams.records.codecs` reads them.

A schema version ``ratchet.sample.v1.N`` only adds fields, so every one of them is read; what this version does not know
of it goes into ``extra``. ``ratchet.sample.v2`` would change what a field means, and is refused.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, date, datetime, time
from functools import cached_property, partial
from typing import Any, Final, Literal, get_args

from ratchet_client.errors import RecordError
from ratchet_client.extra import check_extra, dump_extra

SCHEMA: Final = "ratchet.sample.v1"
TOPIC: Final = "ratchet.samples"
"""Default topic of records."""
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

MAX_NAME_CHARS: Final = 256
MAX_SOURCE_CHARS: Final = 2048
MAX_TAGS: Final = 32
MAX_TAG_CHARS: Final = 64
_MILLISECONDS: Final = 2e10
"""A larger number is not a time in seconds: that would be after the year 2600."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one sample. The defaults are those of ingest."""

    max_image_bytes: int = 8 * 1024 * 1024
    """Largest encoded image."""
    max_pixels: int = 40_000_000
    """Largest decoded image, in pixels."""
    min_side: int = 8
    """Shortest side of an image, in pixels."""
    max_text_chars: int = 2000
    """Longest text, question or answer."""


DEFAULT_LIMITS = Limits()


def digest_bytes(*parts: bytes | memoryview) -> str:
    """SHA-256 of the parts, each preceded by its length so that their borders count. 64 hex digits."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return sha.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with a text, or with a question and its answer. Strings are empty where there is no value.

    Raises:
        RecordError: ``schema``, naming the field that is not valid.
    """

    image: bytes = field(repr=False)
    """The encoded image, as it came."""
    text: str = ""
    question: str = ""
    answer: str = ""
    domain: str = ""
    source: str = ""
    """Origin: a URI or a name."""
    time: datetime | None = None
    """Creation time (UTC); ingest takes the record's time where it is None. Also taken: ISO 8601 text, and
    numbers of seconds (or milliseconds) since 1970."""
    tags: tuple[str, ...] = ()
    """Also taken: text with ``;`` between tags."""
    concept: str = ""
    label: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields that this version does not know; see :mod:`ratchet_client.extra` for their bounds."""

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            try:
                value = check(getattr(self, name))
            except UnicodeEncodeError:  # JSON can hold these, and they are not text
                raise _invalid(name, "it holds half of a surrogate pair") from None
            except (ValueError, OverflowError, OSError) as error:
                raise _invalid(name, str(error)[:200]) from None
            object.__setattr__(self, name, value)

    @cached_property
    def id(self) -> str:
        """SHA-256 of what is learned from: image, text, question, answer. 64 hex digits. Metadata does not count."""
        texts = (part.encode() for part in (self.text, self.question, self.answer))
        return digest_bytes(self.image, *texts)

    def __hash__(self) -> int:
        return hash(self.id)

    def row(self) -> dict[str, Any]:
        """Columns of the sample store that come from the sample; ``extra`` as JSON text, empty where there is none."""
        values = {name: getattr(self, name) for name in FIELDS}
        return {**values, "tags": list(self.tags), "extra": dump_extra(self.extra)}

    def metadata(self) -> dict[str, Any]:
        """The fields that are set, without the image, as JSON has them."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "image"}
        values = {name: value for name, value in values.items() if value}
        if self.time is not None:
            values["time"] = self.time.isoformat().replace("+00:00", "Z")
        return values | ({"tags": list(self.tags)} if self.tags else {})


FIELDS: Final = tuple(each.name for each in fields(Sample))
#: The fields of a record that are not the image.
METADATA: Final = tuple(name for name in FIELDS if name != "image")


def make_sample(given: Mapping[str, Any]) -> Sample:
    """A checked sample. Raises RecordError ``schema`` (naming the field), ``image_missing`` or ``text_missing``."""
    if not given.get("image"):
        raise RecordError("image_missing", "the record has no image.", "Give `image` or `image_uri`.")
    for name in given:
        if name not in FIELDS:
            raise _invalid(name, "there is no such field")
    sample = Sample(**given)
    if not sample.text and not (sample.question and sample.answer):
        unknown = f" It has unknown fields: {', '.join(map(repr, sample.extra))[:200]}." if sample.extra else ""
        raise RecordError(
            "text_missing",
            f"the record has neither a text nor a question with its answer.{unknown}",
            "Describe the image in `text`, or give both `question` and `answer`.",
        )
    return sample


def _invalid(name: object, problem: str) -> RecordError:
    return RecordError(
        "schema",
        f"field {str(name)[:80]!r} of the record is not valid: {problem}.",
        f"The fields of {SCHEMA} are: image or image_uri, {', '.join(METADATA)}.",
    )


def _image(value: object) -> bytes:
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise ValueError(f"it is a {type(value).__name__}, not bytes")
    return bytes(value)


def _text(value: object, max_chars: float = math.inf) -> str:
    text = bytes(value).decode() if isinstance(value, (bytes, bytearray)) else value
    if not isinstance(text, str):
        raise ValueError(f"it is a {type(value).__name__}, not text")
    if len(text) > max_chars:
        raise ValueError(f"it has more than {max_chars} characters")
    text.encode()  # raises UnicodeEncodeError
    return text


def _tags(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(";") if part.strip()]
    if not isinstance(value, Iterable) or isinstance(value, (bytes, bytearray, Mapping)):
        raise ValueError(f"it is a {type(value).__name__}, not a list of tags")
    tags = tuple(map(_text, value))
    if len(tags) > MAX_TAGS:
        raise ValueError(f"there are more than {MAX_TAGS} tags")
    for tag in tags:
        if not 0 < len(tag) <= MAX_TAG_CHARS or ";" in tag:
            raise ValueError(f"tag {tag[:80]!r} is empty, has more than {MAX_TAG_CHARS} characters, or holds a ;")
    return tags


def _time(value: object) -> datetime | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = _number_or_time(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = datetime.fromtimestamp(value / 1000 if abs(value) > _MILLISECONDS else value, UTC)
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time())
    if not isinstance(value, datetime):
        raise ValueError(f"it is a {type(value).__name__}, not a time")
    try:
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    except OverflowError:  # the first and the last day of the calendar, in a zone that is not UTC
        raise ValueError("the time is out of range") from None


def _number_or_time(text: str) -> float | datetime:
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text.upper())


_name = partial(_text, max_chars=MAX_NAME_CHARS)
_CHECKS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "image": _image,
    "text": _text,
    "question": _text,
    "answer": _text,
    "domain": _name,
    "source": partial(_text, max_chars=MAX_SOURCE_CHARS),
    "time": _time,
    "tags": _tags,
    "concept": _name,
    "label": _name,
    "extra": check_extra,
}
"""Converts a given value to that of the field; raises ValueError."""


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
