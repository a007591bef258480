"""What an engine tries before it serves: fixed questions under every adapter, and adapters of its own, which are not
Ratchet adapters, to learn what it does with them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from core.digests import digest12, digest_json
from core.errors import AdapterError
from serving.engines.adapters import CONFIG, WEIGHTS
from serving.engines.golden_inputs import golden_pixels
from serving.engines.vlm.adapter_validation import Shapes
from serving.engines.vlm.generation import GenerationRequest, GenerationResult, question

SIDE = 64
QUESTIONS = ("what is this?", "is there something red? answer yes or no.")
PROBED = ("image", "connector")
"""Parts of a model whose adapters some engines ignore without a word."""
ZERO_ID = 1
"""vLLM's id of the first adapter that is loaded: the one of base traffic, whose delta is zero."""
PROBE_SIZE = 0.1
"""Size of the entries of a probe's delta: many times those of any weight, so that what is applied is seen."""
SAME = 0.01
"""Log-probabilities that differ by less are equal, to bfloat16 on a GPU."""
RANK = 1


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


def write_probe(directory: Path, shapes: Shapes, size: float, seed: int = 0) -> Path:
    """A LoRA of rank 1 in PEFT's format over all ``shapes``, whose deltas have entries of about ``size``."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, (out, inner) in sorted(shapes.items()):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, inner, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * size
    directory.mkdir()
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    leaves = sorted({name.rsplit(".", 1)[-1] for name in shapes})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": leaves, "bias": "none"}
    (directory / CONFIG).write_text(json.dumps(config))
    return directory


def differ(some: Sequence[GenerationResult], others: Sequence[GenerationResult]) -> bool:
    """Whether two sets of answers to the same questions are not the same."""
    for one, other in zip(some, others, strict=True):
        if one.tokens != other.tokens:
            return True
        if any(abs(a - b) > SAME for a, b in zip(one.logprobs, other.logprobs, strict=True)):
            return True
    return False
