"""Requests and answers of a vision-language engine, and the text of an answer as its tokens come.

Imports no model code.

Sampling parameters have the rules of vLLM's ``SamplingParams``, so that both engines answer a request alike, and no
value reaches a tensor in which it is not a number or zero.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from serving.errors import InvalidRequest

_UNFINISHED: Final = "\ufffd"
"""What a decoder shows for the first bytes of a character whose last bytes have not come yet."""
_LOWEST_TEMPERATURE: Final = 1e-2
"""A lower one is raised to it: logits divided by less overflow. 0 stays: it is greedy."""
_HIGHEST_TEMPERATURE: Final = 2.0
SMALLEST: Final = 2.0**-126
"""The smallest normal float32. What is smaller and not 0 is denormal, or 0, in the tensors of a sampler."""
_MOST_TOKENS: Final = 2**31 - 1
SEEDS: Final = 2**63
"""Seeds are from 0 up to it."""

Image = npt.NDArray[np.uint8]
"""RGB pixels [height, width, 3]."""
MAX_IMAGES = 4
"""Images in one request; vLLM sizes its LoRA buffers of the vision tower for so many."""
Finish = Literal["", "stop", "length"]


def is_denormal(value: float) -> bool:
    """True for a value that is too small for a float32 and not 0."""
    return 0.0 < abs(value) < SMALLEST


def _check(field: str, value: float, is_good: bool, allowed: str) -> None:
    if not is_good or (isinstance(value, float) and is_denormal(value)):
        raise InvalidRequest(f"{field}: {str(value)[:40]} is not {allowed}.", f"Send another {field}, or leave it out.")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    ``content`` holds texts, and numbers of images in :attr:`GenerationRequest.images`, in reading order.
    """

    role: Literal["system", "user", "assistant"]
    content: tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request. ``temperature`` 0 is greedy; one below 0.01 is raised to it. ``seed`` makes sampling repeatable.

    Raises :class:`~serving.errors.InvalidRequest`, which names the parameter that is out of its range.
    """

    messages: tuple[Message, ...]
    images: tuple[Image, ...] = ()
    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

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
    """Tokens since the last chunk. The last one has a ``finish``. Log-probabilities are natural, one per token."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    prompt_tokens: int
    completion_tokens: int
    """So far."""
    finish: Finish = ""


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A whole answer."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    prompt_tokens: int
    finish: Finish


PROBE = GenerationRequest((Message("user", ("alive?",)),), max_tokens=1)
"""One forward pass, for health checks."""


def question(image: Image, text: str, max_tokens: int = 32) -> GenerationRequest:
    """One image and one question, answered greedily: what the trainer, the gate and ``/v1/vqa`` ask."""
    return GenerationRequest((Message("user", (0, text)),), (image,), max_tokens)


class Detokenizer:
    """The text of one answer. Text that was returned is never withdrawn: a part that could be the beginning of a stop
    string, or of a character, waits for the tokens after it.

    Everything that :meth:`take` returned, put together, is ``tokenizer.decode(tokens, skip_special_tokens=True)``, cut
    before the first stop string.
    """

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
        """A stop string came; everything after it is dropped."""

    def take(self, tokens: Sequence[int], last: bool) -> str:
        """The text that became certain with these tokens. ``last``: no more tokens will come."""
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
    """Neighbouring chunks as one."""
    text = "".join(chunk.text for chunk in chunks)
    tokens = tuple(token for chunk in chunks for token in chunk.tokens)
    logprobs = tuple(value for chunk in chunks for value in chunk.logprobs)
    last = chunks[-1]
    return TokenChunk(text, tokens, logprobs, last.prompt_tokens, last.completion_tokens, last.finish)


async def whole(chunks: AsyncIterator[TokenChunk]) -> GenerationResult:
    """A stream as one reply."""
    one = merge_chunks([chunk async for chunk in chunks])
    return GenerationResult(one.text, one.tokens, one.logprobs, one.prompt_tokens, one.finish)
