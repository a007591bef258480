"""Symmetric image-text contrast (CLIP's InfoNCE) with several positives where captions repeat."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from updater.methods.objectives.objective import Features, Objective
from updater.recipes import Family


class Contrastive(Objective[Features]):
    """Cross entropy of each row and each column of the similarity matrix against its positives.

    Row i's target is uniform over the rows that carry the same caption (DreamLIP's multi-positive form): with plain
    one-hot targets two pictures of "a red apple" would push each other's caption away.
    """

    family: ClassVar[Family] = "clip"

    def __call__(self, batch: Features) -> Tensor:
        """Mean over both directions, in nats."""
        logits = batch.scale * batch.image @ batch.text.T
        target = (batch.caption[:, None] == batch.caption[None, :]).to(logits.dtype)
        target = target / target.sum(dim=1, keepdim=True)  # symmetric: equal captions have equal counts
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


TERM = Contrastive
