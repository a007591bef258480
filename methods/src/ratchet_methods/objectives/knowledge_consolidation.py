"""Contrastive knowledge consolidation: the old features can be found again from the new ones, through a projection."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from updater.methods.batches import Features
from updater.methods.objectives import ClipObjective, positive


class KnowledgeConsolidation(ClipObjective):
    """Contrast of projected features with those of the model with which the update began, the contrastive knowledge
    consolidation of C-CLIP (Liu et al. 2025): the space may move as long as a linear map leads back.

    One projection for both towers, at first the identity, learned beside the model with an AdamW of its own; a row's
    positives are its own old features (of a text: those of equal captions), all others of its kind are negatives.
    ``rate``: the projection's learning rate.
    """

    teacher: str = "incumbent"

    def __init__(self, rate: float = 1e-3) -> None:
        positive(rate=rate)
        self.rate = rate
        self.projection: nn.Parameter | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    def __call__(self, batch: Features) -> Tensor:
        """Mean over both towers and all rows, in nats."""
        projection = self._made(batch.image)
        teacher = batch.teachers[self.teacher]
        same = (batch.caption[:, None] == batch.caption[None, :]).to(batch.text.dtype)
        own = torch.eye(len(batch.part), device=same.device, dtype=same.dtype)
        losses = [
            F.cross_entropy(batch.scale * F.normalize(new @ projection, dim=1) @ old.T, target)
            for new, old, target in (
                (batch.image, teacher.image, own),
                (batch.text, teacher.text, same / same.sum(dim=1, keepdim=True)),
            )
        ]
        return sum(losses, batch.zero()) / 2

    def _made(self, like: Tensor) -> nn.Parameter:
        if self.projection is None:
            self.projection = nn.Parameter(torch.eye(like.shape[1], device=like.device, dtype=like.dtype))
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW([self.projection], lr=self.rate)
        return self.projection

    def stepped(self, batch: Features) -> None:
        if self._optimizer is not None:
            with torch.enable_grad():
                self._optimizer.step()
            self._optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        return {} if self.projection is None else {"projection": self.projection.detach()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.projection, self._optimizer = nn.Parameter(tensors["projection"].clone()), None
