"""What an objective sees, and what it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from updater.recipes import Part


@dataclass(frozen=True)
class Batch:
    """Features of one step. All are L2-normalised float32 [n, dim]; gradients flow into image and text only.

    ``caption`` [n] holds one integer per distinct caption: rows with the same number describe each other.
    ``part`` names, row by row, where a pair came from. ``scale`` is 1 / temperature.
    """

    image: Tensor
    text: Tensor
    teacher_image: Tensor
    teacher_text: Tensor
    caption: Tensor
    part: tuple[Part, ...]
    scale: float

    def rows(self, parts: Collection[Part]) -> list[int]:
        """Numbers of the rows that came from one of ``parts``."""
        return [row for row, part in enumerate(self.part) if part in parts]

    def select(self, rows: list[int]) -> Batch:
        """The batch of these rows alone."""
        if len(rows) == len(self.part):
            return self
        index = torch.tensor(rows, device=self.image.device)
        return Batch(
            image=self.image[index],
            text=self.text[index],
            teacher_image=self.teacher_image[index],
            teacher_text=self.teacher_text[index],
            caption=self.caption[index],
            part=tuple(self.part[row] for row in rows),
            scale=self.scale,
        )


class Objective(ABC):
    """One term of the loss. Keyword arguments of ``__init__`` are the recipe's ``options``."""

    @abstractmethod
    def __call__(self, batch: Batch) -> Tensor:
        """The term's value: a scalar, a mean over rows, so that it does not grow with the batch."""
