"""How samples lie to the prototypes of what was learned before stays as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from updater.objectives.objective import Features, Objective
from updater.objectives.shared.prototypes import Prototypes
from updater.recipes import Family


class PrototypeRelation(Objective[Features]):
    """Prototype-sample relation distillation (PRD, Asadi et al. 2023), of images.

    A label's prototype is the running mean of the student's image features. For each prototype k that an earlier
    update left, q_k is the softmax over the batch's images of their similarities to it:

        mean over k of KL(q_k of the incumbent's images, to k as it was left || q_k of the student's, to k as it is now)

    Prototypes move with the images of their label, and rows without a label make none; in relations every row counts.
    Where no example of an update has a label, each distinct caption is one. In a first update the value is 0.

    Args:
        temperature: by which similarities are divided.
        most: prototypes that are kept, those seen last.
        window: samples that a mean goes over.
    """

    family: ClassVar[Family] = "clip"
    teacher: str | None = "incumbent"

    def __init__(self, temperature: float = 0.1, most: int = 4096, window: int = 100) -> None:
        if temperature <= 0:
            raise TypeError(f"temperature is {temperature}, and must be above 0")
        self.temperature = temperature
        self.prototypes = Prototypes(["image"], most, window, captions=False)
        self.before: dict[int, Tensor] = {}

    def begin(self, captions: Sequence[str], labels: Sequence[str]) -> None:
        self.prototypes.begin(labels)
        self.before = dict(self.prototypes.means)

    def __call__(self, batch: Features) -> Tensor:
        """In nats."""
        common = [concept for concept in self.before if concept in self.prototypes.means]
        if not common:
            return batch.zero()
        before, now = (
            F.normalize(torch.cat([means[concept] for concept in common]), dim=1)
            for means in (self.before, self.prototypes.means)
        )
        old = (before @ batch.teachers["incumbent"].image.T / self.temperature).log_softmax(dim=1)
        new = (now @ batch.image.T / self.temperature).log_softmax(dim=1)
        return (old.exp() * (old - new)).sum(dim=1).mean()

    def stepped(self, batch: Features) -> None:
        self.prototypes.add(batch, {"image": batch.image})

    def state(self) -> dict[str, Tensor]:
        return self.prototypes.state()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.prototypes.load_state(tensors)


TERM = PrototypeRelation
