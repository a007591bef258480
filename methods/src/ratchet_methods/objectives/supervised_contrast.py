"""Supervised contrast: pull images of one class together and push others apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from updater.methods.batches import Features
from updater.methods.objectives import ClipObjective, positive


class SupervisedContrast(ClipObjective):
    """SupCon (Khosla et al. 2020) of images: the mean, over the other images of its class, of their log-probability in
    the softmax over all other images of the batch. A class is a label or, if no example of an update has one, a
    distinct caption. Images that are alone in their class are only negatives."""

    def __init__(self, temperature: float = 0.1) -> None:
        positive(temperature=temperature)
        self.temperature = temperature
        self._labelled = True

    def begin(self, captions: Sequence[str], labels: Sequence[str]) -> None:
        self._labelled = bool(labels)

    def __call__(self, batch: Features) -> Tensor:
        """Mean over images that share their class with another, in nats; 0 if none does."""
        classes = batch.label if self._labelled else batch.caption
        itself = torch.eye(len(classes), dtype=torch.bool, device=classes.device)
        same = (classes[:, None] == classes[None, :]) & (classes[:, None] >= 0) & ~itself
        counts = same.sum(dim=1)
        if not bool(counts.any()):
            return batch.zero()
        logits = (batch.image @ batch.image.T / self.temperature).masked_fill(itself, -float("inf"))
        shares = logits.log_softmax(dim=1).masked_fill(~same, 0.0)
        return -(shares.sum(dim=1)[counts > 0] / counts[counts > 0]).mean()
