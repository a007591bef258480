"""Converts a question and its answer to tokens and pixels, as serving reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from serving.engines.vlm.generation import question
from serving.engines.vlm.prompts import answer_tokens, end_token, image_token, inputs, render
from serving.engines.vlm.vlm_base import VlmBase
from serving.errors import InvalidRequest
from updater.data.pools import Question

SMALL = 64
"""Bound on the values of an image's tensors that are not pixels, such as its grid of patches."""

LONGEST = 512
"""Maximum tokens of question, answer and the chat template around them. A batch is as long as its longest."""


KNOWN_WORDS = 1 << 16


@dataclass(frozen=True)
class Tokens:
    """Tokens of one example: the prompt, followed by ``answer`` tokens, the last of which is the end."""

    inputs: Mapping[str, Tensor]
    answer: int

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])

    @property
    def prompt(self) -> dict[str, Tensor]:
        return {key: value[: len(self) - self.answer] for key, value in self.inputs.items()}


def answered(prompt: Mapping[str, Tensor], answer: Tensor) -> Tokens:
    inputs = {key: torch.cat([value, torch.zeros_like(answer)]) for key, value in prompt.items()}
    inputs["input_ids"][-len(answer) :] = answer
    return Tokens(inputs, len(answer))


@dataclass(frozen=True)
class Read:
    sequences: list[Tokens]
    images: dict[str, Tensor]

    def beside_pixels(self) -> list[dict[str, Tensor]]:
        """Image inputs of the language model in addition to the image features, per example."""
        count = len(self.sequences)
        small = {
            key: value for key, value in self.images.items()
            if len(value) == count and value.numel() <= SMALL * count
        }  # fmt: skip
        return [{key: value[row : row + 1] for key, value in small.items()} for row in range(count)]


SHOWN = "{question} This is an example of an answer: {answer}. Now answer yourself: {question}"
"""Prompt of a teacher that has read the known answer (after the prompt of SDFT, Shenfeld et al. 2026)."""


def shown(example: Question) -> Question:
    return replace(example, question=SHOWN.format(question=example.question, answer=example.answer))


class Reader:
    def __init__(self, base: VlmBase) -> None:
        self.processor = base.processor()
        self._reading = Lock()  # a fast tokenizer that pads is for one thread at a time
        self._words = lru_cache(KNOWN_WORDS)(self._count)

    @property
    def not_said(self) -> list[int]:
        """Special tokens except the end: no answer has them, and one would stand for an image."""
        tokenizer = self.processor.tokenizer
        special = {*tokenizer.all_special_ids, tokenizer.convert_tokens_to_ids(image_token(self.processor))}
        return sorted(special - {end_token(self.processor), None})

    def takes(self, example: Question) -> bool:
        return 0 < self.words(example) <= LONGEST

    def words(self, example: Question) -> int:
        """Tokens of question, answer and template, with an image of the smallest size; 0 for an invalid question."""
        return self._words(example.question, example.answer)

    def _count(self, words: str, answer: str) -> int:
        try:
            prompt = render(self.processor, question(np.zeros((1, 1, 3), np.uint8), words))
        except InvalidRequest:
            return 0
        return len(self.processor.tokenizer(prompt)["input_ids"]) + len(answer_tokens(self.processor, answer))

    def read(self, examples: Sequence[Question], images: Sequence[np.ndarray]) -> Read:
        asks = [question(image, each.question) for each, image in zip(examples, images, strict=True)]
        with self._reading:
            batch = inputs(self.processor, asks)
        mask = batch.pop("attention_mask").bool()
        shape = batch["input_ids"].shape
        tokenwise = [key for key, value in batch.items() if value.shape == shape]
        sequences = []
        for row, each in enumerate(examples):
            with self._reading:
                answer = torch.tensor(answer_tokens(self.processor, each.answer))
            sequences.append(answered({key: batch[key][row][mask[row]] for key in tokenwise}, answer))
        return Read(sequences, {key: value for key, value in batch.items() if key not in tokenwise})


def pad(sequences: Sequence[Tokens], length: int = 0) -> dict[str, Tensor]:
    """One batch [n, tokens], right-padded: tokens see only what precedes them, so padding changes nothing."""
    longest = max(length, *(len(each) for each in sequences))
    batch: dict[str, Tensor] = {}
    for key, first in sequences[0].inputs.items():
        batch[key] = torch.zeros(len(sequences), longest, dtype=first.dtype)
        for row, each in enumerate(sequences):
            # Padding repeats the last token, which is in every vocabulary and does not stand for an image.
            batch[key][row] = each.inputs[key][-1]
            batch[key][row, : len(each)] = each.inputs[key]
    lengths = torch.tensor([len(each) for each in sequences])
    batch["attention_mask"] = (torch.arange(longest)[None] < lengths[:, None]).long()
    return batch
