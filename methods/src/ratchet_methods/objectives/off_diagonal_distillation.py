"""Off-diagonal distillation: keep the similarities of an image to the texts of other images."""

from __future__ import annotations

from torch import Tensor

from ratchet_methods.objectives.divergence import row_divergence
from updater.methods.batches import Features
from updater.methods.objectives import ClipObjective, known_teacher


class OffDiagonalDistillation(ClipObjective):
    """``1/2 (KL_i + KL_t)`` of Mod-X (Ni et al. 2023), between old and new similarity rows without their positives.

    Rows that the teacher got wrong (its nearest text belongs to another image) do not count: the paper puts the
    student's own row in their place, which adds neither value nor gradient. Pairs with equal captions are positives of
    each other. Similarities are cosines without the model's temperature, as in the published code. That code sums over
    rows and this takes the mean: the paper's alpha is the term's weight divided by its batch of 64.
    """

    def __init__(self, teacher: str = "incumbent") -> None:
        self.teacher: str = known_teacher(teacher)

    def __call__(self, batch: Features) -> Tensor:
        """Mean over both directions and all rows, excluded rows counting 0; in nats."""
        teacher = batch.teachers[self.teacher]
        positive = batch.same_caption
        old = teacher.image @ teacher.text.T
        new = batch.image @ batch.text.T
        return 0.5 * (_mean_divergence(old, new, positive) + _mean_divergence(old.T, new.T, positive))


def _mean_divergence(old: Tensor, new: Tensor, positive: Tensor) -> Tensor:
    right = positive.gather(1, old.argmax(dim=1, keepdim=True))[:, 0]
    return (row_divergence(old, new, positive) * right).mean()
