"""What goes into a vision-language engine and what comes out. Imports no model code.

Sampling parameters have the rules of vLLM's ``SamplingParams``, so that both engines answer a request alike, and no
value reaches a tensor in which it is not a number or zero.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from serving.errors import InvalidRequest

if TYPE_CHECKING:
    from pathlib import Path

    from serving.engines.vlm.vlm_base import VlmBase

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


def _checked_temperature(value: float) -> float:
    """The temperature to sample with. Raises :class:`InvalidRequest`: not a number, denormal, or not in [0, 2]."""
    _check_number("temperature", value)
    if not 0.0 <= value <= _HIGHEST_TEMPERATURE:
        raise _out_of_range("temperature", value, f"from 0 to {_HIGHEST_TEMPERATURE:g}")
    return max(value, _LOWEST_TEMPERATURE) if value > 0 else 0.0


def _checked_top_p(value: float, temperature: float) -> float:
    """The share of the likeliest tokens; 1, which is off, where the choice is greedy. Raises :class:`InvalidRequest`:
    not a number, denormal, or not in (0, 1].
    """
    _check_number("top_p", value)
    if not 0.0 < value <= 1.0:
        raise _out_of_range("top_p", value, "above 0 and at most 1")
    return value if temperature > 0 else 1.0


def _check_max_tokens(value: int) -> None:
    """Raises :class:`InvalidRequest` for none, or more than an engine counts."""
    if not 1 <= value <= _MOST_TOKENS:
        raise _out_of_range("max_tokens", value, "1 or more")


def _check_seed(value: int | None) -> None:
    """Raises :class:`InvalidRequest` for a seed that not every engine takes."""
    if value is not None and not 0 <= value < SEEDS:
        raise _out_of_range("seed", value, "from 0 to 2^63 - 1")


def is_denormal(value: float) -> bool:
    """Whether a value is too small for a float32 and not 0."""
    return 0.0 < abs(value) < SMALLEST


def _check_number(field: str, value: float) -> None:
    if not math.isfinite(value):
        raise _out_of_range(field, value, "a finite number")
    if is_denormal(value):
        raise _out_of_range(field, value, f"0, or at least {SMALLEST:.3g}")


def _out_of_range(field: str, value: float | None, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {str(value)[:40]} is not {allowed}.", f"Send another {field}, or leave it out.")


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
        _check_max_tokens(self.max_tokens)
        _check_seed(self.seed)
        temperature = _checked_temperature(self.temperature)
        object.__setattr__(self, "temperature", temperature)
        object.__setattr__(self, "top_p", _checked_top_p(self.top_p, temperature))


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """What came since the last chunk. The last one has a ``finish``. Log-probabilities are natural, one per token."""

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


class VlmEngine(Protocol):
    """One base and its resident adapters. Used from one event loop."""

    base: VlmBase
    kind: Literal["vllm", "transformers"]

    @property
    def precision(self) -> str:
        """Data type of the weights that run, as torch names it; known after :meth:`start`."""

    @property
    def passed_at(self) -> float:
        """When the last forward pass is known to have ended, on the monotonic clock; 0: none has."""

    async def start(self) -> None:
        """Load the base (seconds to a minute), and find out whether tower adapters are applied."""

    async def load(self, name: str, directory: Path) -> None:
        """Make an adapter resident; twice is once. Raises AdapterError; what was resident stays, and is served on."""

    async def unload(self, name: str) -> None:
        """Forget an adapter when its last request has ended. An unknown name is nothing."""

    def resident(self) -> frozenset[str]:
        """Names that requests may use."""

    def stream(self, request: GenerationRequest, adapter: str | None) -> AsyncIterator[TokenChunk]:
        """Answer chunk by chunk under a resident adapter (None: the base). Closing the iterator aborts the request.

        Raises InvalidRequest, AdapterError (not resident), EngineDead.
        """

    async def reply(self, request: GenerationRequest, adapter: str | None) -> GenerationResult:
        """The whole answer. Cancelling aborts the request."""

    async def score(self, request: GenerationRequest, choices: Sequence[str], adapter: str | None) -> list[float]:
        """Log-probability of each choice as the whole answer (its end included) after the prompt."""

    async def golden(self, adapter: str | None) -> str:
        """Answer fixed inputs: raises AdapterError when a log-probability is not finite; else a short fingerprint."""

    def running(self) -> int:
        """Requests inside."""

    def last_error(self) -> str:
        """Why the engine is dead; empty while it lives."""

    async def close(self) -> None:
        """End it, and every process it started."""
