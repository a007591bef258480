"""Answers of transformers and PEFT, one question at a time: the reference for every engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from serving.engines.vlm.generation import GenerationRequest, Image, question
from serving.engines.vlm.prompts import inputs
from serving.engines.vlm.vlm_base import VlmBase

QUESTIONS = ("what is this?", "is there a red car?", "which colour?", "what is the round apple on?")


@dataclass(frozen=True)
class Reference:
    """A greedy answer. ``margin``: the smallest lead of a chosen token over the next, in log-probability."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    margin: float


class Peft:
    """The base, or the base under one adapter, as ``PeftModel.from_pretrained`` makes it."""

    def __init__(self, base: VlmBase, adapter: Path | None = None) -> None:
        self.processor = base.processor()
        model: Any = base.build_model()
        self.model = model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()

    @torch.inference_mode()
    def greedy(self, ask: GenerationRequest) -> Reference:
        """Token by token, each with a whole forward pass, so that no cache can be wrong."""
        batch = inputs(self.processor, [ask])
        end = self.processor.tokenizer.eos_token_id
        tokens: list[int] = []
        logprobs: list[float] = []
        margin = float("inf")
        while len(tokens) < ask.max_tokens and end not in tokens:
            top = self._next(batch, tokens).topk(2)
            tokens.append(int(top.indices[0]))
            logprobs.append(float(top.values[0]))
            margin = min(margin, float(top.values[0] - top.values[1]))
        return Reference(tuple(tokens), tuple(logprobs), margin)

    @torch.inference_mode()
    def score(self, ask: GenerationRequest, choice: str) -> float:
        """Log-probability of ``choice`` and the end token after the prompt."""
        batch = inputs(self.processor, [ask])
        tokenizer = self.processor.tokenizer
        answer = [*tokenizer(choice, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        return sum(float(self._next(batch, answer[:i])[token]) for i, token in enumerate(answer))

    def _next(self, batch: dict[str, torch.Tensor], said: Sequence[int]) -> torch.Tensor:
        more = torch.tensor([list(said)], dtype=torch.long)
        longer = batch | {
            "input_ids": torch.cat([batch["input_ids"], more], 1),
            "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(more)], 1),
        }
        return torch.as_tensor(self.model(**longer).logits[0, -1].float().log_softmax(-1))


def picture(seed: int, side: int = 32) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)


def some_asks(count: int, tokens: int = 8) -> list[GenerationRequest]:
    return [
        question(picture(i, 24 + 8 * (i % 4)), QUESTIONS[i % len(QUESTIONS)], max_tokens=tokens) for i in range(count)
    ]
