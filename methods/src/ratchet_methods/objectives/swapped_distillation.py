"""Logit-swap distillation: a pair is learned with the least change of what the teacher thinks of all others."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from updater.methods.batches import Features
from updater.methods.objectives import ClipObjective, known_teacher, positive


class SwappedDistillation(ClipObjective):
    """``CE(softmax(z0'), softmax(z))`` in both directions, ``z0'`` a row of the teacher's with its largest value on the
    pair itself.

    Where the teacher's nearest text of an image is another's, that value and the one of its own text change places
    (logit swap, Mix-CPT, Jiang et al. 2024, there of the next token): the right one wins, and all others keep what they
    had. Where the teacher is right it is plain distillation. Pairs with equal captions are right for each other.

    Args:
        teacher: ``base``, or ``incumbent``: the live adapter, with which the update begins.
        temperature: by which both distributions are softened.
    """

    def __init__(self, teacher: str = "incumbent", temperature: float = 1.0) -> None:
        positive(temperature=temperature)
        self.teacher: str = known_teacher(teacher)
        self.temperature = temperature

    def __call__(self, batch: Features) -> Tensor:
        """Mean over both directions and over rows, in nats."""
        teacher = batch.teachers[self.teacher]
        sharpness = batch.scale / self.temperature
        right = batch.caption[:, None] == batch.caption[None, :]
        old = sharpness * teacher.image @ teacher.text.T
        new = sharpness * batch.image @ batch.text.T
        return 0.5 * (_loss(old, new, right) + _loss(old.T, new.T, right))


def _loss(old: Tensor, new: Tensor, right: Tensor) -> Tensor:
    return F.cross_entropy(new, swapped(old, right).softmax(dim=1))


def swapped(logits: Tensor, right: Tensor) -> Tensor:
    """Rows [n, m] whose largest value is where ``right`` bool [n, m] is, by exchange with the largest there."""
    top = logits.argmax(dim=1, keepdim=True)
    best = logits.masked_fill(~right, -float("inf")).argmax(dim=1, keepdim=True)
    largest, own = logits.gather(1, top), logits.gather(1, best)
    wrong = ~right.gather(1, top)
    exchanged = logits.scatter(1, top, own).scatter(1, best, largest)
    return exchanged.where(wrong, logits)
