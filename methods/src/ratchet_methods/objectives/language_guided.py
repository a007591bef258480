"""Language-guided supervision: classify images by frozen text features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from updater.data.pools import caption_number
from updater.methods.batches import Features
from updater.methods.objectives import ClipObjective
from updater.recipes import Part


class LanguageGuided(ClipObjective):
    """Cross entropy of each image against the base's text features of all classes (LingoCL, Ni et al. 2024).

    A class is a label in a prompt. The targets are the same in every update; the text tower gets no gradient. Rows
    without a label do not count. If no example of an update has a label, each distinct caption is a class, without the
    prompt. ``template``: the prompt, with {} for the label.
    """

    frozen_texts: bool = True
    teacher: str | None = "base"

    def __init__(self, template: str = "a photo of a {}.") -> None:
        if template.count("{}") != 1:
            raise TypeError(f"template is {template!r}, which does not have one {{}} for the label")
        self.template = template
        self._captions: list[int] = []

    def further_texts(
        self, captions: Sequence[str], labels: Sequence[str], parts: Sequence[Part]
    ) -> list[tuple[int, str]]:
        if labels:
            self._captions = []
            return [(-1, self.template.replace("{}", label)) for label in labels]
        distinct = {caption_number(text): text.strip().lower() for text in captions}
        self._captions = list(distinct)
        return [(-1, text) for text in distinct.values()]

    def __call__(self, batch: Features) -> Tensor:
        """Mean over rows that have a class, in nats; 0 if none has."""
        classes = batch.label
        if self._captions:
            place = {number: place for place, number in enumerate(self._captions)}
            classes = torch.tensor([place.get(number, -1) for number in batch.caption.tolist()], device=classes.device)
        rows = (classes >= 0).nonzero().flatten()
        if not len(rows):
            return batch.zero()
        targets = batch.texts["language_guided"].teachers["base"]
        return F.cross_entropy(batch.scale * batch.image[rows] @ targets.T, classes[rows])
