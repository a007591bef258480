"""Adapters that an engine loads into itself to learn what it does with them. They are no Ratchet adapters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from serving.engines.adapters import CONFIG, WEIGHTS
from serving.engines.vlm.adapter_validation import Shapes
from serving.engines.vlm.generation import GenerationResult

PROBED = ("image", "connector")
"""Parts of a model whose adapters some engines ignore without a word."""
ZERO_ID = 1
"""vLLM's id of the first adapter that is loaded: the one of base traffic, whose delta is zero."""
PROBE_SIZE = 0.1
"""Size of the entries of a probe's delta: many times those of any weight, so that what is applied is seen."""
SAME = 0.01
"""Log-probabilities that differ by less are equal, to bfloat16 on a GPU."""
RANK = 1


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
