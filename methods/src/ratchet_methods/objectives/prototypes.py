"""Prototypes: a point among features per concept, a running mean or learned, which outlives the update that made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from updater.data.pools import caption_number
from updater.methods.batches import Features


class Prototypes:
    """One mean per concept and per side: the images and the texts of a teacher, say.

    A concept is a label or a caption, known by its words: a caption by its number, which is the same in every update,
    a label by what its number would be as a caption.

    Args:
        sides: names of what means are kept of.
        most: concepts that are kept: those seen last.
        window: samples that a mean goes over: of so many it is their mean, after that an exponential one.
        captions: a pair without a label counts under its caption; else only where no example of an update has a label.
    """

    def __init__(self, sides: Sequence[str], most: int, window: int, captions: bool) -> None:
        if most < 1 or window < 1:
            raise TypeError(f"most is {most} and window is {window}, and both must be at least 1")
        self.sides = list(sides)
        self.most = most
        self.window = window
        self.captions = captions
        self.means: dict[int, Tensor] = {}
        """By concept [sides, dim]; the one seen last is last."""
        self.counts: dict[int, int] = {}
        self._labels: list[int] = []
        self._named = captions

    def begin(self, labels: Sequence[str]) -> None:
        """Learn the words behind the numbers of an update's labels."""
        self._labels = [caption_number(label) for label in labels]
        self._named = self.captions or not labels

    def concepts(self, batch: Features) -> list[int | None]:
        """The concept of each row, None for a row that has none."""
        return [
            self._labels[label] if label >= 0 else caption if self._named else None
            for label, caption in zip(batch.label.tolist(), batch.caption.tolist(), strict=True)
        ]

    def add(self, batch: Features, features: Mapping[str, Tensor]) -> None:
        """Take the rows of a batch into their concepts' means. ``features`` [n, dim] by side."""
        rows = torch.stack([features[side].detach() for side in self.sides], dim=1)
        for concept, row in zip(self.concepts(batch), rows, strict=True):
            if concept is not None:
                count = self.counts.pop(concept, 0) + 1
                mean = self.means.pop(concept, row)
                self.means[concept] = mean + (row - mean) / min(count, self.window)
                self.counts[concept] = count
        self._forget()

    def meet(self, batch: Features, features: Mapping[str, Tensor]) -> None:
        """Begin a point at the first row of each concept that has none; points that are there stay where they are."""
        rows = torch.stack([features[side].detach() for side in self.sides], dim=1)
        for concept, row in zip(self.concepts(batch), rows, strict=True):
            if concept is not None:
                self.means[concept] = self.means.pop(concept, row)
                self.counts[concept] = self.counts.pop(concept, 0) + 1
        self._forget()

    def move(self, points: Tensor) -> None:
        """Put all points [k, sides, dim] elsewhere, in the order of :attr:`means`."""
        self.means = dict(zip(self.means, points, strict=True))

    def _forget(self) -> None:
        for concept in list(self.means)[: -self.most]:
            del self.means[concept], self.counts[concept]

    def of(self, side: str) -> Tensor:
        """The prototypes of one side, [k, dim] of unit length. There must be some."""
        number = self.sides.index(side)
        return F.normalize(torch.stack([mean[number] for mean in self.means.values()]), dim=1)

    def state(self) -> dict[str, Tensor]:
        """All of it; nothing when there is none."""
        if not self.means:
            return {}
        return {
            "concepts": torch.tensor(list(self.means)),
            "counts": torch.tensor(list(self.counts.values())),
            "means": torch.stack(list(self.means.values())),
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` gave."""
        concepts = tensors["concepts"].tolist()
        self.means = dict(zip(concepts, tensors["means"], strict=True))
        self.counts = dict(zip(concepts, tensors["counts"].tolist(), strict=True))
