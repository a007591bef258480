"""Bodies of answers of the inference and catalog calls, as the API's schema describes them.

Routes name them as ``response_model`` and return a ready ``Response``, so that nothing is validated or copied a second
time: a vector goes from numpy to bytes. ``tests/integration/serving/test_openapi.py`` checks the answers against them.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from core.ledger.rows import Family


class ResponseBody(BaseModel):
    """An object of an answer. A field's docstring is its description in the schema.

    A field without a default is always there; one with a default may be left out.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Usage(ResponseBody):
    """Tokens, as OpenAI counts them. An image counts no tokens for the CLIP."""

    prompt_tokens: int
    total_tokens: int


class ChatUsage(Usage):
    """Tokens of a prompt, images included, and of its answer."""

    completion_tokens: int


class EmbeddingUsage(Usage):
    """Tokens, and which texts were cut."""

    truncated: list[int] = []
    """Positions of the inputs that are texts with more tokens than the model reads: their vectors are of the beginning.
    Left out where there are none."""


class Embedding(ResponseBody):
    """One vector of unit length."""

    object: Literal["embedding"]
    index: int
    """Position of the input."""
    embedding: list[float | None] | Annotated[str, Field(json_schema_extra={"contentEncoding": "base64"})]
    """float32 numbers; with `encoding_format: base64` their little-endian bytes in base64."""


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
    """What is live first, then the other resident releases."""

    object: Literal["list"]
    data: list[ModelBody]


class Classification(ResponseBody):
    """One image's labels."""

    label: str | None
    """The likeliest; of a head null where it is none of its classes, or where no level of a label is sure enough."""
    probabilities: dict[str, float | None]
    """From 0 to 1 by label; they add up to 1, but for several labels: then each stands alone."""
    labels: list[str] | None = None
    """With several labels: those that are likelier than not, the likeliest first."""
    distance: float | None = None
    """Of a head: how far the image is from the nearest class; above 1 it is none of them."""


class ClassificationList(ResponseBody):
    """Labels in the order of the images."""

    object: Literal["list"]
    model: str
    """`clip@` and the number of the release."""
    data: list[Classification]


class SearchHit(ResponseBody):
    """A sample that was found."""

    id: str
    """SHA-256 of its content, 64 hex digits."""
    score: float | None
    """Cosine similarity, from -1 to 1."""
    text: str
    domain: str
    source: str
    time: datetime | None
    """Of the sample, UTC."""


class SearchResults(ResponseBody):
    """Hits, the nearest first."""

    object: Literal["list"]
    model: str
    """`clip@` and the number of the release."""
    space: str
    """Digest of the image embedding space that was searched."""
    data: list[SearchHit]


class Choice(ResponseBody):
    """A given answer and how likely it is."""

    text: str
    probability: float
    """From 0 to 1; those of all choices add up to 1."""


class VqaAnswer(ResponseBody):
    """The answer to a question about an image."""

    object: Literal["vqa"]
    answer: str
    choices: list[Choice]
    """In the order of the request; empty where it gave none."""
    usage: ChatUsage | None
    """Null where the request gave choices: they are scored, not generated."""
    model: str
    """`vlm@` and the number of the release."""
    release: int
    adapter: str
    """The adapter's name; `base`: the base alone."""


class TokenLogprob(ResponseBody):
    """One token of the answer."""

    token: str
    logprob: float
    """Natural logarithm of its probability; -9999 stands for minus infinity."""
    bytes: list[int] | None
    """UTF-8; null for a token that is a part of a character."""
    top_logprobs: list[Any]
    """Always empty."""


class Logprobs(ResponseBody):
    """Log-probabilities of the answer's tokens."""

    content: list[TokenLogprob]
    refusal: None


class AssistantMessage(ResponseBody):
    """The model's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class CompletionChoice(ResponseBody):
    """The one answer."""

    index: int
    message: AssistantMessage
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]
    """`stop`: it ended by itself or at a stop text; `length`: at the longest answer that was asked for."""


class ChatCompletionBody(ResponseBody):
    """An answer that is not streamed, as in the OpenAI API."""

    id: str
    object: Literal["chat.completion"]
    created: int
    """Seconds since 1970, UTC."""
    model: str
    """`vlm@` and the number of the release."""
    system_fingerprint: str
    """The adapter's name; `base`: the base alone."""
    choices: list[CompletionChoice]
    usage: ChatUsage


class Delta(ResponseBody):
    """What a chunk adds: the role in the first, text in the others, nothing in the last."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(ResponseBody):
    """A piece of the one answer."""

    index: int
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None
    """Null in all chunks but the last."""


class ChatCompletionChunk(ResponseBody):
    """The data of one server-sent event of a streamed answer, as in the OpenAI API."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    """Seconds since 1970, UTC."""
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    """Empty in the chunk with the usage."""
    usage: ChatUsage | None = None
    """Only with `stream_options.include_usage`: null in all chunks but the last."""
