"""Neighbour alignment: keep which features are neighbours, not where they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from updater.methods.batches import Features
from updater.methods.objectives import ClipObjective, known_teacher, positive


class NeighbourAlignment(ClipObjective):
    """Feature distribution alignment of Proxy-FDA (Huang et al. 2025): a row's nearest neighbours among the teacher's
    features stay nearer than the others.

    A sigmoid loss over all pairs of rows, for images and for texts: positive where j is one of the ``neighbours``
    nearest of i in the teacher's space. The bias of a row is half-way between its last neighbour and the next row, in
    the teacher's space, where the paper learns one. ``proxies``: rows that are added to each batch, means of a row and
    its nearest neighbour on the sphere, student's and teacher's alike; the paper's are made by a learned generator.
    """

    def __init__(
        self, neighbours: int = 5, sharpness: float = 10.0, proxies: bool = True, teacher: str = "base"
    ) -> None:
        positive(neighbours=neighbours, sharpness=sharpness)
        self.neighbours = neighbours
        self.sharpness = sharpness
        self.proxies = proxies
        self.teacher: str = known_teacher(teacher)

    def __call__(self, batch: Features) -> Tensor:
        """Mean over both towers, rows and both kinds of pairs, in nats."""
        teacher = batch.teachers[self.teacher]
        if len(batch.part) < 3:
            return batch.zero()
        return (self._tower(batch.image, teacher.image) + self._tower(batch.text, teacher.text)) / 2

    def _tower(self, new: Tensor, old: Tensor) -> Tensor:
        if self.proxies:
            nearest = _without_self(old @ old.T).argmax(dim=1)
            new, old = (torch.cat([each, F.normalize(each + each[nearest], dim=1)]) for each in (new, old))
        similar = _without_self(old @ old.T)
        count = min(self.neighbours, len(old) - 2)
        best = similar.topk(count + 1, dim=1).values
        border = best[:, -2:].mean(dim=1, keepdim=True)
        inside = similar > border
        logits = self.sharpness * (new @ new.T - border)
        others = ~inside & torch.isfinite(similar)
        pull = (F.softplus(-logits) * inside).sum(dim=1) / inside.sum(dim=1).clamp_min(1)
        push = (F.softplus(logits) * others).sum(dim=1) / others.sum(dim=1).clamp_min(1)
        return (pull + push).mean()


def _without_self(similar: Tensor) -> Tensor:
    return similar.masked_fill(torch.eye(len(similar), dtype=torch.bool, device=similar.device), -torch.inf)
