"""Prototype-sample relation distillation: keep the relations of samples to prototypes of earlier data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ratchet_methods.objectives.prototypes import Prototypes
from updater.methods.batches import Features
from updater.methods.objectives import ClipObjective, positive


class PrototypeRelation(ClipObjective):
    """Prototype-sample relation distillation (PRD, Asadi et al. 2023), of images.

    Each label has a learned prototype that starts at the first image with that label. For each prototype k that an
    earlier update left, q_k is the softmax over the batch's images of their similarities to it:

        mean over k of KL(q_k of the incumbent's images, to k as it was left || q_k of the student's, to k as it is now)

    After each step of the student the prototypes take one step of gradient descent, on this value plus ``pull`` times
    the mean of 1 - cosine between an image and its label's prototype; images get no gradient from the latter. Rows
    without a label have no prototype, but count in relations. If no example of an update has a label, each distinct
    caption is one. In a first update the value is 0. The paper's supervised contrast is a separate term.

    Args:
        temperature: divides similarities.
        rate: learning rate of the prototypes (0.01 in the published code, times the weight 4 that is the term's here).
        pull: see above (2 to 4 in the published code).
        most: prototypes to keep, those seen last.
    """

    teacher: str | None = "incumbent"

    def __init__(self, temperature: float = 0.1, rate: float = 0.04, pull: float = 0.5, most: int = 4096) -> None:
        positive(temperature=temperature, rate=rate, pull=pull)
        self.temperature = temperature
        self.rate = rate
        self.pull = pull
        self.prototypes = Prototypes(["image"], most, window=1, captions=False)
        self.before: dict[int, Tensor] = {}

    def begin(self, captions: Sequence[str], labels: Sequence[str]) -> None:
        self.prototypes.begin(labels)
        self.before = dict(self.prototypes.means)

    def __call__(self, batch: Features) -> Tensor:
        common = [concept for concept in self.before if concept in self.prototypes.means]
        if not common:
            return batch.zero()
        now = torch.cat([self.prototypes.means[concept] for concept in common])
        return self._relation(batch, common, now, batch.image)

    def _relation(self, batch: Features, common: Sequence[int], now: Tensor, image: Tensor) -> Tensor:
        before = F.normalize(torch.cat([self.before[concept] for concept in common]), dim=1)
        old = (before @ batch.teachers["incumbent"].image.T / self.temperature).log_softmax(dim=1)
        new = (F.normalize(now, dim=1) @ image.T / self.temperature).log_softmax(dim=1)
        return (old.exp() * (old - new)).sum(dim=1).mean()

    @torch.enable_grad()
    def stepped(self, batch: Features) -> None:
        image = batch.image.detach()
        self.prototypes.meet(batch, {"image": image})
        place = {concept: number for number, concept in enumerate(self.prototypes.means)}
        if not place:
            return
        points = torch.cat(list(self.prototypes.means.values())).requires_grad_()
        own = [(row, place[c]) for row, c in enumerate(self.prototypes.concepts(batch)) if c in place]
        loss = batch.zero().detach()
        if own:
            rows, numbers = map(list, zip(*own, strict=True))
            loss = loss + self.pull * (1 - F.cosine_similarity(points[numbers], image[rows])).mean()
        if common := [concept for concept in self.before if concept in place]:
            loss = loss + self._relation(batch, common, points[[place[concept] for concept in common]], image)
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, points)
            self.prototypes.move((points - self.rate * gradient).detach()[:, None])

    def state(self) -> dict[str, Tensor]:
        return self.prototypes.state()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.prototypes.load_state(tensors)
