"""Requests and answers of a VLM engine, and incremental detokenization. Imports no model code. Sampling parameters
follow vLLM's ``SamplingParams``, so that both engines answer alike and no value becomes NaN or zero in a tensor."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from serving.errors import InvalidRequest

_UNFINISHED: Final = "\ufffd"
"""Decoders show this for a character whose last bytes are missing."""
_LOWEST_TEMPERATURE: Final = 1e-2
"""Lower temperatures are raised to it, because logits divided by less overflow; 0 stays and is greedy."""
_HIGHEST_TEMPERATURE: Final = 2.0
SMALLEST: Final = 2.0**-126
"""The smallest normal float32; smaller values are denormal or 0 in a sampler's tensors."""
_MOST_TOKENS: Final = 2**31 - 1
SEEDS: Final = 2**63

Image = npt.NDArray[np.uint8]
"""RGB pixels [height, width, 3]."""
MAX_IMAGES = 4
"""Images per request; vLLM sizes the vision tower's LoRA buffers for them."""
Finish = Literal["", "stop", "length"]


def is_denormal(value: float) -> bool:
    return 0.0 < abs(value) < SMALLEST


def _check(field: str, value: float, is_good: bool, allowed: str) -> None:
    if not is_good or (isinstance(value, float) and is_denormal(value)):
        raise InvalidRequest(f"{field}: {str(value)[:40]} is not {allowed}.", f"Send another {field}, or leave it out.")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``content``: texts, and indices into :attr:`GenerationRequest.images`, in reading order."""

    role: Literal["system", "user", "assistant"]
    content: tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request. ``temperature`` 0 is greedy, others below 0.01 are raised to it; ``seed`` makes sampling repeatable.
    Raises :class:`~serving.errors.InvalidRequest` naming the parameter that is out of range."""

    messages: tuple[Message, ...]
    images: tuple[Image, ...] = ()
    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    json_schema: str = ""
    """A JSON Schema that the answer has to follow, as JSON; empty: none. For vLLM only."""

    def __post_init__(self) -> None:
        temperature, top_p, seed = self.temperature, self.top_p, self.seed
        _check("max_tokens", self.max_tokens, 1 <= self.max_tokens <= _MOST_TOKENS, "1 or more")
        _check("seed", seed or 0, seed is None or 0 <= seed < SEEDS, "from 0 to 2^63 - 1")
        _check("temperature", temperature, 0 <= temperature <= _HIGHEST_TEMPERATURE, "from 0 to 2")
        _check("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1")
        object.__setattr__(self, "temperature", max(temperature, _LOWEST_TEMPERATURE) if temperature > 0 else 0.0)
        object.__setattr__(self, "top_p", top_p if temperature > 0 else 1.0)


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Tokens since the last chunk; the last has a ``finish``. Log-probabilities are natural, one per token."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    prompt_tokens: int
    completion_tokens: int
    finish: Finish = ""


@dataclass(frozen=True, slots=True)
class GenerationResult:
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    prompt_tokens: int
    finish: Finish


PROBE = GenerationRequest((Message("user", ("alive?",)),), max_tokens=1)
"""One forward pass, for health checks."""


def question(image: Image, text: str, max_tokens: int = 32) -> GenerationRequest:
    """One image and one question, answered greedily, as trainer, gate and ``/v1/vqa`` ask."""
    return GenerationRequest((Message("user", (0, text)),), (image,), max_tokens)


CHOICES: Final = ("yes", "no")
ABOUT_IMAGE: Final = "does this show {}?"
"""How rerankings ask whether an image matches a text: as the shipped VLM was taught, and as users ask under /v1/vqa.
Rerankers and plain VLMs understand it."""


class Detokenizer:
    """Incremental text of one answer. Returned text is never withdrawn: a possible beginning of a stop string or
    character waits for more tokens. The returned parts join to ``tokenizer.decode(tokens, skip_special_tokens=True)``,
    cut before the first stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._backend = tokenizer._tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(text for text in stop if text)
        self._hold = max((len(text) - 1 for text in self._stop), default=0)
        self._tokens: list[int] = []
        self._text = ""
        self._sent = 0
        self.stopped = False
        """True once a stop string came; later text is dropped."""

    def take(self, tokens: Sequence[int], last: bool) -> str:
        """Text that became certain with these tokens. ``last``: no more will come."""
        if self.stopped:
            return ""
        searched = max(0, len(self._text) - self._hold)
        for token in tokens:
            self._tokens.append(token)
            self._text += self._stream.step(self._backend, token) or ""
        if last:
            whole = str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
            if whole.startswith(self._text[: self._sent]):
                self._text = whole
        stops = [index for index in (self._text.find(text, searched) for text in self._stop) if index >= 0]
        if stops:
            self.stopped = True
            self._text = self._text[: min(stops)]
        end = len(self._text) if last or self.stopped else max(self._sent, len(self._text) - self._hold)
        certain = self._text[self._sent : end]
        if not (last or self.stopped):
            certain = certain.rstrip(_UNFINISHED)
        self._sent += len(certain)
        return certain


def merge_chunks(chunks: Sequence[TokenChunk]) -> TokenChunk:
    text = "".join(chunk.text for chunk in chunks)
    tokens = tuple(token for chunk in chunks for token in chunk.tokens)
    logprobs = tuple(value for chunk in chunks for value in chunk.logprobs)
    last = chunks[-1]
    return TokenChunk(text, tokens, logprobs, last.prompt_tokens, last.completion_tokens, last.finish)


async def whole(chunks: AsyncIterator[TokenChunk]) -> GenerationResult:
    one = merge_chunks([chunk async for chunk in chunks])
    return GenerationResult(one.text, one.tokens, one.logprobs, one.prompt_tokens, one.finish)
