"""From a question and its answer to tokens and pixels, as serving reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from serving.engines.vlm.ask import Ask, AskError, question
from serving.engines.vlm.base import VlmBase
from serving.engines.vlm.prompts import conversation, inputs, render
from streams.images import decode_image
from updater.pools import Question

SMALL = 64
"""Values of one image that are no pixels, such as its grid of patches, are at most this many."""

LONGEST = 512
"""Most tokens of question, answer and what the chat template writes around them. A batch is as long as its longest."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of one example: the prompt, and then ``answer`` tokens, of which the last one is the end."""

    inputs: Mapping[str, Tensor]
    """``input_ids`` [tokens], and what else the model takes of each token."""
    answer: int

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])


@dataclass(frozen=True)
class Read:
    """A chunk of examples. ``images`` are the processor's outputs for all of them."""

    sequences: list[Tokens]
    images: dict[str, Tensor]

    def beside_pixels(self) -> list[dict[str, Tensor]]:
        """Example by example, what the language model takes of an image besides what the image tower made of it."""
        count = len(self.sequences)
        small = {
            key: value for key, value in self.images.items()
            if len(value) == count and value.numel() <= SMALL * count
        }  # fmt: skip
        return [{key: value[row : row + 1] for key, value in small.items()} for row in range(count)]


class Reader:
    """The processor of a base, and the tokens that end its answers."""

    def __init__(self, base: VlmBase, model: nn.Module) -> None:
        self.processor = base.processor()
        ends: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        if ends is None:
            ends = self.processor.tokenizer.eos_token_id
        self.ends: list[int] = list(ends) if isinstance(ends, list | tuple) else [int(ends)]

    def takes(self, example: Question) -> bool:
        """Whether a question can be asked at all, and is not too long with its answer."""
        blank = question(np.zeros((1, 1, 3), np.uint8), example.question)
        try:
            prompt = self.processor.tokenizer(render(self.processor, blank))["input_ids"]
            return len(prompt) + len(self.answer(blank, example.answer)) <= LONGEST
        except AskError:
            return False

    def read(self, examples: Sequence[Question], encoded: Sequence[bytes]) -> Read:
        """Tokens and pixels of a chunk of examples, from their encoded images."""
        asks = [
            question(np.array(decode_image(image)), each.question)
            for each, image in zip(examples, encoded, strict=True)
        ]
        batch = inputs(self.processor, asks)
        mask = batch.pop("attention_mask").bool()
        shape = batch["input_ids"].shape
        tokenwise = [key for key, value in batch.items() if value.shape == shape]
        sequences = []
        for row, (ask, each) in enumerate(zip(asks, examples, strict=True)):
            answer = torch.tensor(self.answer(ask, each.answer))
            own = {key: torch.cat([batch[key][row][mask[row]], torch.zeros_like(answer)]) for key in tokenwise}
            own["input_ids"][-len(answer) :] = answer
            sequences.append(Tokens(own, len(answer)))
        return Read(sequences, {key: value for key, value in batch.items() if key not in tokenwise})

    def answer(self, ask: Ask, answer: str) -> list[int]:
        """Ids of an answer as the chat template writes it behind the prompt, up to and with its end token."""
        prompt = render(self.processor, ask)
        turns = [*conversation(ask), {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        whole = str(self.processor.apply_chat_template(turns, tokenize=False))
        text = whole.removeprefix(prompt) if whole.startswith(prompt) else answer
        ids: list[int] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        end = next((place for place, token in enumerate(ids) if token in self.ends), None)
        return [*ids, self.ends[0]] if end is None else ids[: end + 1]


def pad(sequences: Sequence[Tokens], padding: int, length: int = 0) -> dict[str, Tensor]:
    """One batch [n, tokens], padded behind: a token sees only what is before it, so that padding changes nothing."""
    longest = max(length, *(len(each) for each in sequences))
    batch: dict[str, Tensor] = {}
    for key, first in sequences[0].inputs.items():
        fill = padding if key == "input_ids" else 0
        batch[key] = torch.full((len(sequences), longest), fill, dtype=first.dtype)
        for row, each in enumerate(sequences):
            batch[key][row, : len(each)] = each.inputs[key]
    lengths = torch.tensor([len(each) for each in sequences])
    batch["attention_mask"] = (torch.arange(longest)[None] < lengths[:, None]).long()
    return batch
