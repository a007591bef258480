"""Fixed questions that every adapter answers before it serves."""

from __future__ import annotations

import math
from collections.abc import Sequence

from core.digests import digest12, digest_json
from core.errors import AdapterError
from serving.engines.golden_inputs import golden_pixels
from serving.engines.vlm.generation import GenerationRequest, GenerationResult, question

SIDE = 64
QUESTIONS = ("what is this?", "is there something red? answer yes or no.")


def golden_requests() -> list[GenerationRequest]:
    """Two pictures made by integer arithmetic, one question each, eight tokens."""
    pictures = golden_pixels(SIDE)
    return [question(pictures[i], text, max_tokens=8) for i, text in enumerate(QUESTIONS)]


def fingerprint(adapter: str | None, replies: Sequence[GenerationResult]) -> str:
    """Twelve hex digits of the answers' tokens, and their mean log-probability.

    Raises :class:`AdapterError` when one is not finite.
    """
    logprobs = [value for reply in replies for value in reply.logprobs]
    if not logprobs or not all(map(math.isfinite, logprobs)):
        raise AdapterError(
            f"{adapter or 'The base'} answers golden questions with log-probabilities that are not finite.",
            "Do not release it; look at the training run.",
        )
    tokens = digest12(digest_json([list(reply.tokens) for reply in replies]))
    return f"{tokens}:{sum(logprobs) / len(logprobs):.2f}"
