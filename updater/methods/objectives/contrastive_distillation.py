"""Contrastive distillation: each image keeps its distribution over the texts, and each text its over the images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from updater.methods.objectives.objective import Features, Objective, known_teacher, positive
from updater.recipes import Family, Part

NAME = "contrastive_distillation"


class ContrastiveDistillation(Objective[Features]):
    """``L_img + L_txt`` of ZSCL (Zheng et al. 2023); over new rows, with the incumbent as teacher, it is LwF's.

    ``L_img = T^2 CE(softmax(z0 / T), softmax(z / T))`` with ``z = scale image @ text.T`` of the student and ``z0`` of
    the teacher, row by row; ``L_txt`` is the same of ``z.T``. Both factors of ``z`` are the student's: with the
    teacher's texts in it, nothing would hold the text tower.

    Args:
        temperature: T; above 1 the unlikely texts count more.
        teacher: ``base``, or ``incumbent``: the live adapter, with which the update begins.
        captions: of the reference pool, so many distinct ones stand beside the batch's own texts in ``L_img``, as the
            teacher sees them (ZSCL compares each image with the texts of the whole reference, all of them frozen);
            evenly spread where there are more.
    """

    family: ClassVar[Family] = "clip"

    def __init__(self, temperature: float = 2.0, teacher: str = "base", captions: int = 0) -> None:
        positive(temperature=temperature)
        if captions < 0:
            raise TypeError(f"captions is {captions}, and must be at least 0")
        self.temperature = temperature
        self.teacher: str = known_teacher(teacher, "base", "incumbent")
        self.captions = captions
        self.frozen_texts = captions > 0

    def further_texts(
        self, captions: Sequence[str], labels: Sequence[str], parts: Sequence[Part]
    ) -> list[tuple[int, str]]:
        distinct = list(
            dict.fromkeys(c.strip().lower() for c, part in zip(captions, parts, strict=True) if part == "reference")
        )
        count = min(self.captions, len(distinct))
        return [(-1, distinct[number * len(distinct) // count]) for number in range(count)]

    def __call__(self, batch: Features) -> Tensor:
        """Sum over both directions of the mean over rows, in nats. Where nothing moved, it is T^2 times the teacher's
        entropy, and its gradient is 0."""
        teacher = batch.teachers[self.teacher]
        sharpness = batch.scale / self.temperature
        old = sharpness * teacher.image @ teacher.text.T
        new = sharpness * batch.image @ batch.text.T
        text = F.cross_entropy(new.T, old.T.softmax(dim=1))
        if self.captions and (further := batch.texts.get(NAME)) is not None:
            frozen = further.teachers[self.teacher]
            old = torch.cat([old, sharpness * teacher.image @ frozen.T], dim=1)
            new = torch.cat([new, sharpness * batch.image @ frozen.T], dim=1)
        image = F.cross_entropy(new, old.softmax(dim=1))
        return self.temperature**2 * (image + text)


TERM = ContrastiveDistillation
