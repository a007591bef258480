"""Prototypes: one point in feature space per concept, a running mean or learned, kept across updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from updater.data.pools import caption_number
from updater.methods.batches import Features


class Prototypes:
    """One mean per concept and side (for example, the images and the texts of a teacher).

    A concept is a label or a caption, identified by ``caption_number`` of its words, the same in every update.

    Args:
        sides: names of the features that have means.
        most: concepts to keep, those seen last.
        window: number of samples up to which the mean is exact; after that it is an exponential one.
        captions: a pair without a label counts under its caption; otherwise only if an update has no labels.
    """

    def __init__(self, sides: Sequence[str], most: int, window: int, captions: bool) -> None:
        if most < 1 or window < 1:
            raise TypeError(f"most is {most} and window is {window}, and both must be at least 1")
        self.sides = list(sides)
        self.most = most
        self.window = window
        self.captions = captions
        self.means: dict[int, Tensor] = {}
        """By concept, [sides, dim]; the most recently seen is last."""
        self.counts: dict[int, int] = {}
        self._labels: list[int] = []
        self._named = captions

    def begin(self, labels: Sequence[str]) -> None:
        self._labels = [caption_number(label) for label in labels]
        self._named = self.captions or not labels

    def concepts(self, batch: Features) -> list[int | None]:
        """Concept of each row; None for a row without one."""
        return [
            self._labels[label] if label >= 0 else caption if self._named else None
            for label, caption in zip(batch.label.tolist(), batch.caption.tolist(), strict=True)
        ]

    def add(self, batch: Features, features: Mapping[str, Tensor]) -> None:
        """Update the means with the rows of a batch. ``features``: [n, dim] by side."""
        rows = torch.stack([features[side].detach() for side in self.sides], dim=1)
        for concept, row in zip(self.concepts(batch), rows, strict=True):
            if concept is not None:
                count = self.counts.pop(concept, 0) + 1
                mean = self.means.pop(concept, row)
                self.means[concept] = mean + (row - mean) / min(count, self.window)
                self.counts[concept] = count
        self._forget()

    def meet(self, batch: Features, features: Mapping[str, Tensor]) -> None:
        """Start a point at the first row of each new concept; existing points stay where they are."""
        rows = torch.stack([features[side].detach() for side in self.sides], dim=1)
        for concept, row in zip(self.concepts(batch), rows, strict=True):
            if concept is not None:
                self.means[concept] = self.means.pop(concept, row)
                self.counts[concept] = self.counts.pop(concept, 0) + 1
        self._forget()

    def move(self, points: Tensor) -> None:
        """Replace all points, [k, sides, dim] in the order of :attr:`means`."""
        self.means = dict(zip(self.means, points, strict=True))

    def _forget(self) -> None:
        for concept in list(self.means)[: -self.most]:
            del self.means[concept], self.counts[concept]

    def of(self, side: str) -> Tensor:
        """Prototypes of one side, [k, dim] of unit length. There must be at least one."""
        number = self.sides.index(side)
        return F.normalize(torch.stack([mean[number] for mean in self.means.values()]), dim=1)

    def state(self) -> dict[str, Tensor]:
        if not self.means:
            return {}
        return {
            "concepts": torch.tensor(list(self.means)),
            "counts": torch.tensor(list(self.counts.values())),
            "means": torch.stack(list(self.means.values())),
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        concepts = tensors["concepts"].tolist()
        self.means = dict(zip(concepts, tensors["means"], strict=True))
        self.counts = dict(zip(concepts, tensors["counts"].tolist(), strict=True))
