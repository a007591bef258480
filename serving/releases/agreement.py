"""Whether two releases agree about one input.

Two CLIPs agree about an item when they put the same things near it. Vectors of two releases cannot be compared with
each other, but the order can in which each release ranks the same reference items by similarity: an update that passed
the gate moves vectors and keeps most of that order, a broken one loses it. Images are ranked against texts and texts
against images, as in classification and search. The references are a few fixed texts, which every release is asked
first, and what clients sent last.

Two VLMs agree when the greedy answers are the same, or when the new one finds the incumbent's answer about as likely as
the incumbent does.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from serving.messages import Modality

Vector = npt.NDArray[np.float32]
REFERENCES = 64
"""Of each kind: the newest, besides the fixed texts."""
FEWEST = 8
"""With fewer references a rank correlation says little."""
SAME_ORDER = 0.5
"""Spearman's correlation from which on two orders count as the same."""
NATS_PER_TOKEN = 3.0
"""How much less likely, per token, the incumbent's answer may be to the other VLM."""
TEXTS = (
    "a photo of a cat", "a dog", "a bird in the sky", "a fish", "a tree", "a red flower", "fruit on a plate",
    "a slice of cake", "a car", "a bicycle", "a ship at sea", "a house", "a map", "the flag of a country", "a book",
    "a musical instrument", "a smiling face", "a hand", "a person walking", "a child playing", "a ball", "a clock",
    "a key", "a sword", "a green monster", "a robot", "the moon", "rain and clouds", "a mountain", "a shoe",
    "a blue circle", "a yellow square",
)  # fmt: skip
"""What images are ranked against from the start: things that differ from each other."""


class Neighbours:
    """Reference items with their vectors under both releases."""

    def __init__(self) -> None:
        self._fixed: list[tuple[Vector, Vector]] = []
        self._newest: dict[Modality, deque[tuple[Vector, Vector]]] = {
            "image": deque(maxlen=REFERENCES), "text": deque(maxlen=REFERENCES),
        }  # fmt: skip

    def fix(self, one: Vector, other: Vector) -> None:
        """Vectors [n, dim] of :data:`TEXTS`."""
        self._fixed = list(zip(one, other, strict=True))

    def judge(self, kind: Modality, one: Vector, other: Vector) -> bool | None:
        """Whether both releases agree about an item, which is a reference from then on. None: too few references."""
        texts = [*self._fixed, *self._newest["text"]]
        images = list(self._newest["image"])
        near = texts if kind == "image" or len(images) < FEWEST else images
        self._newest[kind].append((one, other))
        if len(near) < FEWEST:
            return None
        return order(one, [pair[0] for pair in near], other, [pair[1] for pair in near]) >= SAME_ORDER


def order(one: Vector, ones: Sequence[Vector], other: Vector, others: Sequence[Vector]) -> float:
    """Spearman's correlation of the similarities to the same references under two releases; 0 where there is none:
    values that are not finite, or all the same.
    """
    from scipy.stats import rankdata  # here, because it takes a second, and only what is on trial is compared

    first, second = np.stack(ones) @ one, np.stack(others) @ other
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return 0.0
    ranks = [rankdata(row) - (len(row) + 1) / 2 for row in (first, second)]
    size = math.sqrt(float(ranks[0] @ ranks[0]) * float(ranks[1] @ ranks[1]))
    return float(ranks[0] @ ranks[1]) / size if size else 0.0


def same_answer(incumbent: str, other: str, incumbent_score: float, other_score: float, tokens: int) -> bool:
    """Whether two VLMs agree.

    Args:
        incumbent_score, other_score: log-probability of the *incumbent's* answer under each.
        tokens: of that answer.
    """
    if incumbent.strip() == other.strip():
        return True
    if not (math.isfinite(incumbent_score) and math.isfinite(other_score)):
        return False
    return incumbent_score - other_score <= NATS_PER_TOKEN * max(1, tokens)
