"""Backward compatibility: new queries find old documents in an index of old, mixed or new vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from updater.methods.batches import Features
from updater.methods.objectives import ClipObjective, known_teacher


class BackwardCompatible(ClipObjective):
    """The new-to-old contrastive term of hot-refresh training (RACT, Zhang et al. 2022), between the towers.

    A new text's positive is its image's *old* vector; its negatives are the old and new vectors of the other images,
    both of which an index holds while it is refreshed. The same applies to new images and old texts. Pairs with equal
    captions are positives of each other.

    Args:
        teacher: ``incumbent`` (the live adapter, whose vectors are in the index) or ``base``.
    """

    def __init__(self, teacher: str = "incumbent") -> None:
        self.teacher: str = known_teacher(teacher)

    def __call__(self, batch: Features) -> Tensor:
        """Mean over both directions, in nats."""
        old = batch.teachers[self.teacher]
        positive = batch.same_caption
        new = batch.scale * batch.image @ batch.text.T
        image = _contrast(batch.scale * batch.image @ old.text.T, new, positive)
        text = _contrast(batch.scale * batch.text @ old.image.T, new.T, positive)
        return 0.5 * (image + text)


def _contrast(to_old: Tensor, to_new: Tensor, positive: Tensor) -> Tensor:
    """Mean over rows of the negative mean log-probability of a row's positives, among all old and the negative new."""
    norm = torch.cat([to_old, to_new.masked_fill(positive, -torch.inf)], dim=1).logsumexp(dim=1)
    return (norm - (to_old * positive).sum(dim=1) / positive.sum(dim=1)).mean()
