"""Contrastive knowledge consolidation: the old features can be found again from the new ones, through a projection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from updater.methods.batches import Features
from updater.methods.objectives import ClipObjective, positive


class KnowledgeConsolidation(ClipObjective):
    """Contrast of projected features with those of the model with which the update began, the contrastive knowledge
    consolidation of C-CLIP (Liu et al. 2025): the space may move as long as a linear map leads back.

    One projection for both towers, at first the identity. After each step of the student it takes a step of gradient
    descent on this value, where the paper trains it together with the student. A row's positives are its own old
    features (of a text: those of equal captions), all others of its kind are negatives. ``rate``: the projection's
    learning rate.
    """

    teacher: str = "incumbent"

    def __init__(self, rate: float = 1e-3) -> None:
        positive(rate=rate)
        self.rate = rate
        self.projection: Tensor | None = None

    def __call__(self, batch: Features) -> Tensor:
        """Mean over both towers and all rows, in nats."""
        return self._value(batch, self._projection(batch))

    def _projection(self, batch: Features) -> Tensor:
        """[dim, dim]."""
        return torch.eye(batch.image.shape[1]).to(batch.image) if self.projection is None else self.projection

    def _value(self, batch: Features, projection: Tensor) -> Tensor:
        teacher = batch.teachers[self.teacher]
        own = torch.eye(len(batch.part)).to(batch.image)
        image = F.cross_entropy(batch.scale * F.normalize(batch.image @ projection, dim=1) @ teacher.image.T, own)
        text = F.cross_entropy(
            batch.scale * F.normalize(batch.text @ projection, dim=1) @ teacher.text.T, batch.caption_targets
        )
        return (image + text) / 2

    @torch.enable_grad()
    def stepped(self, batch: Features) -> None:
        still = replace(batch, image=batch.image.detach(), text=batch.text.detach())
        projection = self._projection(batch).requires_grad_()
        (gradient,) = torch.autograd.grad(self._value(still, projection), projection)
        self.projection = (projection - self.rate * gradient).detach()

    def state(self) -> dict[str, Tensor]:
        return {} if self.projection is None else {"projection": self.projection}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.projection = tensors["projection"]
