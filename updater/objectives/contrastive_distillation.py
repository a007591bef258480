"""Contrastive distillation: each image keeps its distribution over the texts, and each text its over the images."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from updater.objectives.objective import Features, Objective, known_teacher, positive
from updater.recipes import Family


class ContrastiveDistillation(Objective[Features]):
    """``L_img + L_txt`` of ZSCL (Zheng et al. 2023); over new rows, with the incumbent as teacher, it is LwF's.

    ``L_img = T^2 CE(softmax(z0 / T), softmax(z / T))`` with ``z = scale image @ text.T`` of the student and ``z0`` of
    the teacher, row by row; ``L_txt`` is the same of ``z.T``. Both factors of ``z`` are the student's: with the
    teacher's texts in it, nothing would hold the text tower.

    Args:
        temperature: T; above 1 the unlikely texts count more.
        teacher: ``base``, or ``incumbent``: the live adapter, with which the update begins.
    """

    family: ClassVar[Family] = "clip"

    def __init__(self, temperature: float = 2.0, teacher: str = "base") -> None:
        positive(temperature=temperature)
        self.temperature = temperature
        self.teacher: str = known_teacher(teacher, "base", "incumbent")

    def __call__(self, batch: Features) -> Tensor:
        """Sum over both directions of the mean over rows, in nats. Where nothing moved, it is T^2 times the teacher's
        entropy, and its gradient is 0."""
        teacher = batch.teachers[self.teacher]
        sharpness = batch.scale / self.temperature
        old = sharpness * teacher.image @ teacher.text.T
        new = sharpness * batch.image @ batch.text.T
        image = F.cross_entropy(new, old.softmax(dim=1))
        text = F.cross_entropy(new.T, old.T.softmax(dim=1))
        return self.temperature**2 * (image + text)


TERM = ContrastiveDistillation
