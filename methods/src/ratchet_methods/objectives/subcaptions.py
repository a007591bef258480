"""Sub-captions: each sentence and clause of a long caption is a positive of its image."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from updater.methods.batches import Features
from updater.methods.objectives import ClipObjective
from updater.recipes import Part

END = re.compile(r"[.,;:!?]+(?:\s+|$)|\n+")
"""Split points of a caption: punctuation followed by a space, so that 3.5 and U.S. stay whole."""


class Subcaptions(ClipObjective):
    """Contrast of images with the parts of their captions (DreamLIP, Zheng et al. 2024).

    An image's target is uniform over its own sub-captions among those of the batch; a sub-caption's is uniform over the
    images whose captions contain it. A caption that cannot be split has none: `contrastive` covers it.

    Args:
        most: sub-captions to use of one caption, spread evenly over it.
        shortest: minimum words: "on a table" says little about a picture.
    """

    def __init__(self, most: int = 4, shortest: int = 3) -> None:
        if most < 1 or shortest < 1:
            raise TypeError(f"most is {most} and shortest is {shortest}, and both must be at least 1")
        self.most = most
        self.shortest = shortest

    def begin(self, captions: Sequence[str], labels: Sequence[str]) -> None:
        self.same = torch.zeros(0, dtype=torch.long)

    def further_texts(
        self, captions: Sequence[str], labels: Sequence[str], parts: Sequence[Part]
    ) -> list[tuple[int, str]]:
        wanted = [
            (example, part)
            for example, caption in enumerate(captions)
            for part in split(caption, self.most, self.shortest)
        ]
        known: dict[str, int] = {}
        self.same = torch.tensor([known.setdefault(part.lower(), len(known)) for _, part in wanted], dtype=torch.long)
        return wanted

    def __call__(self, batch: Features) -> Tensor:
        """Mean over both directions, in nats; 0 if no caption of the batch has a part."""
        texts = batch.texts.get("subcaptions")
        if texts is None or not len(texts.row):
            return batch.zero()
        same = self.same.to(texts.row.device)[texts.number]
        own = texts.row[None, :] == torch.arange(len(batch.part), device=texts.row.device)[:, None]
        equal = (same[:, None] == same[None, :]).to(batch.image.dtype)
        positive = (own.to(batch.image.dtype) @ equal).clamp(max=1)  # [n, m]: image i's caption contains text j
        with_parts = positive.sum(dim=1) > 0
        logits = batch.scale * batch.image @ texts.text.T
        by_image, by_text = positive[with_parts], positive.T
        images = F.cross_entropy(logits[with_parts], by_image / by_image.sum(dim=1, keepdim=True))
        return 0.5 * (images + F.cross_entropy(logits.T, by_text / by_text.sum(dim=1, keepdim=True)))


def split(caption: str, most: int, shortest: int) -> list[str]:
    """The distinct parts of a caption, in order; none when it is one part as a whole.

    >>> split("A red car on a wet road, seen from above. Two men wait.", most=4, shortest=3)
    ['A red car on a wet road', 'seen from above', 'Two men wait']
    """
    pieces = [piece.strip() for piece in END.split(caption) if piece.strip()]
    if len(pieces) < 2:
        return []
    parts = list(dict.fromkeys(piece for piece in pieces if len(piece.split()) >= shortest))
    if len(parts) <= most:
        return parts
    return [parts[number * len(parts) // most] for number in range(most)]
