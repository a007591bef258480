"""Hybrid contrastive-distillation: soft labels, which mix the own caption with a teacher's view of the batch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from updater.methods.batches import Features
from updater.methods.objectives import ClipObjective, known_teacher, positive


class HybridDistillation(ClipObjective):
    """Contrast whose targets are a mean of the own caption and of the teacher's softmax over the batch, the hybrid
    contrastive-distillation of CLIP-Refine (Yamaguchi et al. 2025), without its random feature alignment.

    A wrong caption costs less, because the teacher gives it little. ``own``: weight of the own caption (the paper's
    alpha); rows with the same caption share it. ``temperature``: of both softmaxes, above the model's own.
    """

    def __init__(self, own: float = 0.5, temperature: float = 1.0, teacher: str = "base") -> None:
        positive(temperature=temperature)
        if not 0 <= own <= 1:
            raise TypeError(f"own is {own}, and must be between 0 and 1")
        self.own = own
        self.temperature = temperature
        self.teacher: str = known_teacher(teacher)

    def __call__(self, batch: Features) -> Tensor:
        """Mean over both directions and all rows, in nats times T^2."""
        teacher = batch.teachers[self.teacher]
        sharpness = batch.scale / self.temperature
        old, new = sharpness * teacher.image @ teacher.text.T, sharpness * batch.image @ batch.text.T
        own = self.own * batch.caption_targets
        image = F.cross_entropy(new, own + (1 - self.own) * old.softmax(dim=1))
        text = F.cross_entropy(new.T, own + (1 - self.own) * old.T.softmax(dim=1))
        return self.temperature**2 * (image + text) / 2
