"""What goes into a vision-language engine and what comes out. Imports no model code."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from serving.engines.vlm.base import VlmBase
from serving.errors import InvalidRequest

Image = npt.NDArray[np.uint8]
"""RGB pixels [height, width, 3]."""
Finish = Literal["", "stop", "length"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    ``content`` holds texts, and numbers of images in :attr:`GenerationRequest.images`, in reading order.
    """

    role: Literal["system", "user", "assistant"]
    content: tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request. ``temperature`` 0 is greedy; ``seed`` makes sampling repeatable. Raises :class:`InvalidRequest`."""

    messages: tuple[Message, ...]
    images: tuple[Image, ...] = ()
    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (self.max_tokens >= 1 and 0.0 <= self.temperature < math.inf and 0.0 < self.top_p <= 1.0):
            raise InvalidRequest(
                f"max_tokens {self.max_tokens}, temperature {self.temperature}, top_p {self.top_p}: not all are valid.",
                "max_tokens is 1 or more, temperature 0 or more, top_p above 0 and at most 1.",
            )
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise InvalidRequest(f"The seed {self.seed} is out of range.", "Take one from 0 to 2^63 - 1.")


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """What came since the last piece. The last one has a ``finish``. Log-probabilities are natural, one per token."""

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
"""One forward pass, for health checks: it gets in when the queue is full."""


def question(image: Image, text: str, max_tokens: int = 32) -> GenerationRequest:
    """One image and one question, answered greedily: what the trainer, the gate and ``/v1/vqa`` ask."""
    return GenerationRequest((Message("user", (0, text)),), (image,), max_tokens)


class VlmEngine(Protocol):
    """One base and its resident adapters. Used from one event loop."""

    base: VlmBase
    kind: Literal["vllm", "transformers"]

    async def start(self) -> None:
        """Load the base (seconds to a minute), and find out whether tower adapters are applied."""

    async def load(self, name: str, directory: Path) -> None:
        """Make an adapter resident; twice is once. Raises AdapterError; what was resident stays, and is served on."""

    async def unload(self, name: str) -> None:
        """Forget an adapter when its last request has ended. An unknown name is nothing."""

    def resident(self) -> frozenset[str]:
        """Names that requests may use."""

    def stream(self, request: GenerationRequest, adapter: str | None) -> AsyncIterator[TokenChunk]:
        """Answer piece by piece under a resident adapter (None: the base). Closing the iterator aborts the request.

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

    def trouble(self) -> str:
        """Why the engine is dead; empty while it lives."""

    async def close(self) -> None:
        """End it, and every process it started."""
