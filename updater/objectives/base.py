"""What an objective sees, and what it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor

from updater.recipes import Family, Part


@dataclass(frozen=True)
class Batch(ABC):
    """The rows of one step. ``part`` names, row by row, where an example came from."""

    part: tuple[Part, ...]

    def rows(self, parts: Collection[Part]) -> list[int]:
        """Numbers of the rows that came from one of ``parts``."""
        return [row for row, part in enumerate(self.part) if part in parts]

    def select(self, rows: list[int]) -> Self:
        """The batch of these rows alone."""
        return self if len(rows) == len(self.part) else self._select(rows)

    @abstractmethod
    def zero(self) -> Tensor:
        """A scalar 0 where the batch is."""

    @abstractmethod
    def _select(self, rows: list[int]) -> Self: ...


@dataclass(frozen=True)
class Features(Batch):
    """What a CLIP made of pairs. All are L2-normalised float32 [n, dim]; gradients flow into image and text only.

    ``caption`` [n] holds one integer per distinct caption: rows with the same number describe each other.
    ``scale`` is 1 / temperature.
    """

    image: Tensor
    text: Tensor
    teacher_image: Tensor
    teacher_text: Tensor
    caption: Tensor
    scale: float

    def zero(self) -> Tensor:
        return self.image.new_zeros(())

    def _select(self, rows: list[int]) -> Self:
        index = torch.tensor(rows, device=self.image.device)
        return type(self)(
            part=tuple(self.part[row] for row in rows),
            image=self.image[index],
            text=self.text[index],
            teacher_image=self.teacher_image[index],
            teacher_text=self.teacher_text[index],
            caption=self.caption[index],
            scale=self.scale,
        )


@dataclass(frozen=True)
class Teacher:
    """A teacher's distribution over the next token, at answer tokens: its most probable tokens, and the rest as one.

    ``tokens`` int [t, k] and ``logprobs`` float32 [t, k], natural, most probable first; ``rest`` float32 [t] is the
    log-probability of all others together, -inf when k is the whole vocabulary.
    """

    tokens: Tensor
    logprobs: Tensor
    rest: Tensor

    def __getitem__(self, index: Tensor) -> Teacher:
        """The same at some of the tokens."""
        return Teacher(self.tokens[index], self.logprobs[index], self.rest[index])


@dataclass(frozen=True)
class Answers(Batch):
    """What a VLM made of answers: all answer tokens of all rows one after another, their end tokens included.

    ``logits`` float32 [t, vocabulary] are the student's, before each token; ``target`` int [t] is the token itself and
    ``row`` int [t] the row that it belongs to. ``teachers`` are by name, ``base`` or ``incumbent``; what they say of
    rows that no objective compares is undefined.
    """

    logits: Tensor
    target: Tensor
    row: Tensor
    teachers: Mapping[str, Teacher]

    def zero(self) -> Tensor:
        return self.logits.new_zeros(())

    def mean_over_rows(self, values: Tensor) -> Tensor:
        """Each row's mean over its tokens, and then the mean over rows: long answers count as much as short ones."""
        rows = len(self.part)
        sums = values.new_zeros(rows).index_add(0, self.row, values)
        return (sums / torch.bincount(self.row, minlength=rows)).mean()

    def _select(self, rows: list[int]) -> Self:
        place = torch.full((len(self.part),), -1, device=self.row.device)
        place[torch.tensor(rows, device=place.device)] = torch.arange(len(rows), device=place.device)
        index = (place[self.row] >= 0).nonzero().flatten()
        return type(self)(
            part=tuple(self.part[row] for row in rows),
            logits=self.logits[index],
            target=self.target[index],
            row=place[self.row[index]],
            teachers={name: teacher[index] for name, teacher in self.teachers.items()},
        )


B = TypeVar("B", bound=Batch)


class Objective(ABC, Generic[B]):
    """One term of the loss. Keyword arguments of ``__init__`` are the recipe's ``options``."""

    family: ClassVar[Family]
    """The models whose batches it takes."""

    @abstractmethod
    def __call__(self, batch: B) -> Tensor:
        """The term's value: a scalar, a mean over rows, so that it does not grow with the batch."""
