"""Logit-swap distillation: learn a pair with the least change to the teacher's other similarities."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from updater.methods.batches import Features
from updater.methods.objectives import ClipObjective, known_teacher, positive


class SwappedDistillation(ClipObjective):
    """``CE(softmax(z0'), softmax(z))`` in both directions, ``z0'`` being a teacher's row with its largest value moved
    to the pair itself.

    If the teacher's nearest text belongs to another image, that value and the one of the image's own text are exchanged
    (logit swap, Mix-CPT, Jiang et al. 2024, there for the next token), and all others stay. If the teacher is right,
    this is plain distillation. Pairs with equal captions are right for each other.
    """

    def __init__(self, teacher: str = "incumbent", temperature: float = 1.0) -> None:
        positive(temperature=temperature)
        self.teacher: str = known_teacher(teacher)
        self.temperature = temperature

    def __call__(self, batch: Features) -> Tensor:
        """Mean over both directions and over rows, in nats."""
        teacher = batch.teachers[self.teacher]
        sharpness = batch.scale / self.temperature
        right = batch.same_caption
        old = sharpness * teacher.image @ teacher.text.T
        new = sharpness * batch.image @ batch.text.T
        return 0.5 * (_loss(old, new, right) + _loss(old.T, new.T, right))


def _loss(old: Tensor, new: Tensor, right: Tensor) -> Tensor:
    return F.cross_entropy(new, swapped(old, right).softmax(dim=1))


def swapped(logits: Tensor, right: Tensor) -> Tensor:
    """Exchange the largest value of each row [n, m] with the largest one where ``right`` bool [n, m] is true."""
    top = logits.argmax(dim=1, keepdim=True)
    best = logits.masked_fill(~right, -float("inf")).argmax(dim=1, keepdim=True)
    largest, own = logits.gather(1, top), logits.gather(1, best)
    wrong = ~right.gather(1, top)
    exchanged = logits.scatter(1, top, own).scatter(1, best, largest)
    return exchanged.where(wrong, logits)
