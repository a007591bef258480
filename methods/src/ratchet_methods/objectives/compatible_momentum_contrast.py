"""Compatible momentum contrast: image-text contrast with a momentum model that also stays near the start."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from updater.methods.batches import Features, TeacherFeatures
from updater.methods.objectives import ClipObjective, positive


class CompatibleMomentumContrast(ClipObjective):
    """Contrast of the student's images with the momentum model's texts and a queue of them, and vice versa (CTP).

    The momentum model becomes ``keep`` times itself, ``new`` times the student, and the rest the model with which the
    update began (Zhu et al. 2023), so that its targets stay compatible with both. Keys with the row's caption are
    positives, also in the queue: samples repeat within one update. ``queue``: pairs kept from earlier steps.
    """

    teacher: str = "momentum"

    def __init__(self, temperature: float = 0.07, queue: int = 1024, keep: float = 0.9, new: float = 0.05) -> None:
        positive(temperature=temperature, queue=queue, keep=keep, new=new)
        if keep + new > 1:
            raise TypeError(f"keep and new add up to {keep + new:g}, and the start has the rest of 1")
        self.temperature = temperature
        self.size = queue
        self.momentum = (keep, new, 1 - keep - new)
        self.queue: TeacherFeatures | None = None
        self.caption = torch.zeros(0, dtype=torch.long)

    def __call__(self, batch: Features) -> Tensor:
        """Mean over both directions, in nats."""
        keys, caption = self._keys(batch)
        positive = batch.caption[:, None] == caption[None, :]
        target = positive / positive.sum(dim=1, keepdim=True)
        image = F.cross_entropy(batch.image @ keys.text.T / self.temperature, target)
        text = F.cross_entropy(batch.text @ keys.image.T / self.temperature, target)
        return 0.5 * (image + text)

    def stepped(self, batch: Features) -> None:
        keys, caption = self._keys(batch)
        self.queue = TeacherFeatures(keys.image[: self.size], keys.text[: self.size])
        self.caption = caption[: self.size]

    def _keys(self, batch: Features) -> tuple[TeacherFeatures, Tensor]:
        teacher = batch.teachers[self.teacher]
        if self.queue is None:
            return teacher, batch.caption
        keys = TeacherFeatures(torch.cat([teacher.image, self.queue.image]), torch.cat([teacher.text, self.queue.text]))
        return keys, torch.cat([batch.caption, self.caption])

    def state(self) -> dict[str, Tensor]:
        if self.queue is None:
            return {}
        return {"image": self.queue.image, "text": self.queue.text, "caption": self.caption}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        image, text, self.caption = (tensors[name][: self.size] for name in ("image", "text", "caption"))
        self.queue = TeacherFeatures(image, text)
