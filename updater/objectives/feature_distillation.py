"""Feature distillation: both towers stay where the base put them."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from updater.objectives.base import Features, Objective, known_teacher
from updater.recipes import Family


class FeatureDistillation(Objective[Features]):
    """Mean squared distance on the unit sphere to the teacher's features, of images and of texts.

    Both towers are held: with only the image tower distilled, the texts are free to drift.

    Args:
        image: weight of the image tower's part.
        text: weight of the text tower's part.
        teacher: ``base``, or ``incumbent``: the live adapter, with which the update begins.
    """

    family: ClassVar[Family] = "clip"

    def __init__(self, image: float = 1.0, text: float = 1.0, teacher: str = "base") -> None:
        self.image = image
        self.text = text
        self.teacher: str = known_teacher(teacher, "base", "incumbent")

    def __call__(self, batch: Features) -> Tensor:
        """``|x - x0|^2`` averaged over rows and towers: 0 when nothing moved, 4 at the opposite pole."""
        teacher = batch.teachers[self.teacher]
        image = (batch.image - teacher.image).square().sum(dim=1).mean()
        text = (batch.text - teacher.text).square().sum(dim=1).mean()
        return (self.image * image + self.text * text) / 2


TERM = FeatureDistillation
