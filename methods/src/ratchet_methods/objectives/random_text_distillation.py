"""Distillation against random texts: each image keeps its distribution over meaningless strings."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor
from torch.nn import functional as F

from updater.methods.batches import Features
from updater.methods.objectives import ClipObjective, known_teacher, positive
from updater.recipes import Part

NAME = "random_text_distillation"


class RandomTextDistillation(ClipObjective):
    """LwF over a vocabulary of replayed random strings (LwF-VR, Ding et al. 2022).

    ``T^2 CE(softmax(z0 / T), softmax(z / T))`` over the strings for each image, for when no text of the old domains is
    available.

    Args:
        count: strings; all are encoded at each step.
        length: whole-word tokens of CLIP's vocabulary in each string. Other tokenizers may split some.
        seed: determines the strings, with ``count`` and ``length``.
    """

    def __init__(
        self,
        count: int = 64,
        length: int = 10,
        seed: int = 0,
        temperature: float = 2.0,
        teacher: str = "incumbent",
    ) -> None:
        positive(count=count, length=length, temperature=temperature)
        self.texts = random_texts(count, length, seed)
        self.temperature = temperature
        self.teacher: str = known_teacher(teacher)

    def further_texts(
        self, captions: Sequence[str], labels: Sequence[str], parts: Sequence[Part]
    ) -> list[tuple[int, str]]:
        return [(-1, text) for text in self.texts]

    def __call__(self, batch: Features) -> Tensor:
        """Mean over images, in nats; its gradient is 0 if nothing moved."""
        texts = batch.texts[NAME]
        sharpness = batch.scale / self.temperature
        old = sharpness * batch.teachers[self.teacher].image @ texts.teachers[self.teacher].T
        new = sharpness * batch.image @ texts.text.T
        return self.temperature**2 * F.cross_entropy(new, old.softmax(dim=1))


def random_texts(count: int, length: int, seed: int) -> list[str]:
    words = _words()
    drawn = random.Random(seed)  # noqa: S311 - nothing is kept secret
    return [" ".join(drawn.choices(words, k=length)) for _ in range(count)]


@cache
def _words() -> list[str]:
    tokens = (token.removesuffix("</w>") for token in SimpleTokenizer().encoder if token.endswith("</w>"))
    return [word for word in tokens if word.isascii() and word.isalpha()]
