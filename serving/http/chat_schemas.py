"""The body of /v1/chat/completions.

Unlike other bodies it may carry fields that are not ours: OpenAI's clients send many. One that changes nothing is
taken; one that would is refused by its name (:func:`refuse_unknown`), never silently dropped.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, FailFast, Field, model_validator

from serving.engines.vlm.generation import SMALLEST, is_denormal
from serving.http.errors import ApiError
from serving.http.json_bodies import OpenAIBody, is_empty
from serving.http.schemas import VLM_MODEL, ImageUrl

MAX_MESSAGES = 256
Stop = Annotated[str, Field(min_length=1, max_length=100)]


def _not_denormal(value: float) -> float:
    if is_denormal(value):
        raise ValueError(f"Input is too small: it should be 0, or at least {SMALLEST:.3g}")
    return value


Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False), AfterValidator(_not_denormal)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), AfterValidator(_not_denormal)]

HARMLESS = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "parallel_tool_calls",
}  # fmt: skip
"""Fields that never change an answer of this server."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,),
    "logit_bias": ({},), "top_logprobs": (0,), "response_format": ({"type": "text"},), "modalities": (["text"],),
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "top_k": (-1, 0), "min_p": (0,), "min_tokens": (0,), "ignore_eos": (False,), "use_beam_search": (False,),
    "skip_special_tokens": (True,), "echo": (False,), "reasoning_effort": ("none",), "verbosity": ("medium",),
}  # fmt: skip
"""Fields of OpenAI and of vLLM that are taken with these values, which mean that they are off."""
UNSUPPORTED = {"audio", "prediction", "web_search_options", "moderation"}
MESSAGE_FIELDS = {"name"}


class ContentPart(OpenAIBody):
    """{"type": "text", "text": "..."} or {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}"""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def has_what_it_says(self) -> ContentPart:
        """A part carries what its type names, and nothing else."""
        other = "image_url" if self.type == "text" else "text"
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of type {self.type!r} needs the field {self.type!r}")
        if getattr(self, other) is not None:
            raise ValueError(f"a part of type {self.type!r} takes no field {other!r}")
        return self


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class ChatMessage(OpenAIBody):
    """One turn. Images go into user messages."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[ContentPart], FailFast(), BeforeValidator(_parts, json_schema_input_type=str | list[ContentPart])
    ]


class StreamOptions(OpenAIBody):
    """What a stream carries besides the text."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = Field(False, description="One more chunk before [DONE], with the tokens.")


class ChatRequest(OpenAIBody):
    """A conversation to go on with; images as data URIs, or as URLs."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "additionalProperties": False,
            "examples": [
                {
                    "model": "vlm", "max_tokens": 16,
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo..."}},
                                {"type": "text", "text": "what colour is the bus?"},
                            ],
                        }
                    ],
                },
                {"model": "vlm", "messages": [{"role": "user", "content": "hello"}], "stream": True},
            ],
        },
    )  # fmt: skip
    messages: Annotated[list[ChatMessage], FailFast()] = Field(
        min_length=1, max_length=MAX_MESSAGES, description="The conversation so far, the oldest message first."
    )
    model: str = VLM_MODEL
    max_tokens: int | None = Field(None, ge=1, description="Longest answer; at most, and by default, the server's own.")
    max_completion_tokens: int | None = Field(None, ge=1, description="OpenAI's newer name of max_tokens.")
    temperature: Temperature | None = Field(
        None, description="0, the default, always takes the likeliest token. Between 0 and 0.01 is 0.01."
    )
    top_p: TopP | None = Field(None, description="Sample from the likeliest tokens with this share.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Makes sampling repeatable.")
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=4)] | None = Field(
        None, description="One text or up to four that end the answer; they are not part of it."
    )
    stream: bool | None = Field(None, description="Send the answer piece by piece, as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="With `stream`: what the stream carries besides.")
    logprobs: bool | None = Field(None, description="Return each token's natural log-probability.")

    @property
    def stops(self) -> tuple[str, ...]:
        """Always a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def caller(self) -> str | None:
        """OpenAI's ``user``: who asks."""
        name = (self.model_extra or {}).get("user")
        return name if isinstance(name, str) else None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


def refuse_unknown(body: ChatRequest) -> None:
    """Refuse what would change the answer if it were honoured, and drop what would not: it may have any shape, and as
    objects of Python many times its size. Raises ApiError naming the field.
    """
    extra = body.model_extra or {}
    for name, value in extra.items():
        if name in HARMLESS or value in NEUTRAL.get(name, ()):
            continue
        if name in NEUTRAL:
            allowed = " or ".join(repr(each) for each in NEUTRAL[name])
            raise ApiError(
                400, f"{name}: this server takes only {allowed} here. Leave it out.", param=name,
                code="unsupported_parameter",
            )  # fmt: skip
        shown = name[:80]
        if name in UNSUPPORTED:
            raise ApiError(400, f"{shown} is not supported here.", param=shown, code="unsupported_parameter")
        raise ApiError(400, f"unknown parameter: {shown!r}.", param=shown, code="unknown_parameter")
    caller = body.caller
    extra.clear()
    if caller is not None:
        extra["user"] = caller
    for index, message in enumerate(body.messages):
        for name, value in (message.model_extra or {}).items():
            if not (is_empty(value) or name in MESSAGE_FIELDS):
                place = f"messages.{index}.{name[:80]}"
                raise ApiError(400, f"{place} is not supported here.", param=place, code="unsupported_parameter")
        if message.model_extra:
            message.model_extra.clear()
