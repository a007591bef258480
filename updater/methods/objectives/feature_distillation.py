"""Feature distillation: both towers stay where a teacher puts them."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from updater.methods.objectives.objective import Features, Objective, known_teacher
from updater.recipes import Family


class FeatureDistillation(Objective[Features]):
    """Mean squared distance on the unit sphere to the teacher's features, of images and of texts.

    Both towers are held: with only the image tower distilled, the texts are free to drift.

    Args:
        image: weight of the image tower's part.
        text: weight of the text tower's part.
        teacher: ``base``, or ``incumbent``: the adapter with which the update begins; the base where there is none.
        replay: the same for replayed rows, where they have another teacher. Held to the base, they are pulled back to
            what they were before they were learned.
    """

    family: ClassVar[Family] = "clip"

    def __init__(self, image: float = 1.0, text: float = 1.0, teacher: str = "base", replay: str | None = None) -> None:
        self.image = image
        self.text = text
        self.teacher: str = known_teacher(teacher, "base", "incumbent")
        self.replay_teacher = known_teacher(replay, "base", "incumbent") if replay is not None else None

    def __call__(self, batch: Features) -> Tensor:
        """``|x - x0|^2`` averaged over rows and towers: 0 when nothing moved, 4 at the opposite pole."""
        teacher = batch.taught(self.teacher_of)
        image = (batch.image - teacher.image).square().sum(dim=1).mean()
        text = (batch.text - teacher.text).square().sum(dim=1).mean()
        return (self.image * image + self.text * text) / 2


TERM = FeatureDistillation
