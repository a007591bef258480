"""Batches: the rows of one step as objectives and teachers see them, :class:`Features` for a CLIP, :class:`AnswerBatch`
for a VLM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from updater.recipes import Part


@dataclass(frozen=True)
class Batch(ABC):
    """The rows of one step. ``part`` is the pool of each row."""

    part: tuple[Part, ...]

    def rows(self, parts: Collection[Part]) -> list[int]:
        return [row for row, part in enumerate(self.part) if part in parts]

    def select(self, rows: list[int]) -> Self:
        return self if len(rows) == len(self.part) else self._select(rows)

    @abstractmethod
    def zero(self) -> Tensor:
        """A scalar 0 on the batch's device."""

    @abstractmethod
    def _select(self, rows: list[int]) -> Self: ...


@dataclass(frozen=True)
class TeacherFeatures:
    """Another model's features of the same pairs: unit length, [n, dim], without gradients."""

    image: Tensor
    text: Tensor

    def __getitem__(self, index: Tensor) -> TeacherFeatures:
        return TeacherFeatures(self.image[index], self.text[index])


@dataclass(frozen=True)
class AuxiliaryTexts:
    """An objective's own texts: features [m, dim] of the student and each teacher, of unit length. ``row`` int [m] is
    the batch row of a text, -1 for a text in every batch. ``number`` int [m] is its index in the objective's
    ``further_texts``. With ``Objective.frozen_texts``, ``text`` is of the incumbent."""

    text: Tensor
    teachers: Mapping[str, Tensor]
    row: Tensor
    number: Tensor

    def select(self, rows: Sequence[int], size: int) -> AuxiliaryTexts:
        place = torch.full((size + 1,), -2, device=self.row.device)
        place[torch.tensor(rows, device=place.device)] = torch.arange(len(rows), device=place.device)
        place[-1] = -1
        new = place[self.row]
        index = (new >= -1).nonzero().flatten()
        teachers = {name: features[index] for name, features in self.teachers.items()}
        return AuxiliaryTexts(self.text[index], teachers, new[index], self.number[index])


@dataclass(frozen=True)
class Features(Batch):
    """A CLIP's features of pairs. All are L2-normalised float32 [n, dim]; only the student's have gradients.

    ``caption`` int [n] has one number per distinct caption, the same in every update: rows with the same number
    describe each other. ``label`` int [n] has one number per distinct label, -1 for pairs without one. ``scale`` is 1 /
    temperature. ``teachers`` by name: ``base``, ``incumbent`` (the model with which the update begins), ``momentum`` (a
    running mean of the student). ``texts`` are by objective.
    """

    image: Tensor
    text: Tensor
    teachers: Mapping[str, TeacherFeatures]
    caption: Tensor
    label: Tensor
    scale: float
    texts: Mapping[str, AuxiliaryTexts] = field(default_factory=dict)
    domain: Tensor | None = None
    """int [n], one number per domain; None: all are of one."""

    @property
    def same_caption(self) -> Tensor:
        """bool [n, n]: rows that describe each other, each itself included."""
        return self.caption[:, None] == self.caption[None, :]

    @property
    def caption_targets(self) -> Tensor:
        """float32 [n, n]: of each row the distribution that is uniform over :attr:`same_caption`; symmetric, as equal
        captions have equal counts."""
        same = self.same_caption.float()
        return same / same.sum(dim=1, keepdim=True)

    def teacher_features(self, teacher_of: Callable[[Part], str | None]) -> TeacherFeatures:
        names = [teacher_of(part) for part in self.part]
        image, text = self.image.detach(), self.text.detach()
        for name in dict.fromkeys(names):
            own = torch.tensor([each == name for each in names], device=image.device)[:, None]
            teacher = self.teachers[name or ""]
            image, text = torch.where(own, teacher.image, image), torch.where(own, teacher.text, text)
        return TeacherFeatures(image, text)

    def zero(self) -> Tensor:
        # With zero gradients, so that a step in which no term has rows costs as much as any other.
        return 0.0 * (self.image.sum() + self.text.sum())

    def _select(self, rows: list[int]) -> Self:
        index = torch.tensor(rows, device=self.image.device)
        return type(self)(
            part=tuple(self.part[row] for row in rows),
            image=self.image[index],
            text=self.text[index],
            teachers={name: teacher[index] for name, teacher in self.teachers.items()},
            caption=self.caption[index],
            label=self.label[index],
            scale=self.scale,
            texts={name: texts.select(rows, len(self.part)) for name, texts in self.texts.items()},
            domain=None if self.domain is None else self.domain[index],
        )


@dataclass(frozen=True)
class Teacher:
    """A teacher's distribution over the next token at answer tokens: the most probable tokens, and one bucket for the
    rest. ``tokens`` int [t, k] and ``logprobs`` float32 [t, k] (natural), most probable first; ``rest`` float32 [t] is
    the log-probability of all others together, -inf if k is the whole vocabulary."""

    tokens: Tensor
    logprobs: Tensor
    rest: Tensor

    def __getitem__(self, index: Tensor) -> Teacher:
        return Teacher(self.tokens[index], self.logprobs[index], self.rest[index])


@dataclass(frozen=True)
class OwnAnswers:
    """A VLM's current answers to some rows of a batch, all tokens one after another. ``logits`` float32 [t, vocabulary]
    are the student's before each token; ``teacher`` those of the momentum model that has read the known answer, without
    gradients. ``row`` int [t] is the row of the batch."""

    logits: Tensor
    teacher: Tensor
    row: Tensor


@dataclass(frozen=True)
class AnswerBatch(Batch):
    """A VLM's logits at answers: all answer tokens of all rows one after another, including end tokens. ``logits``
    float32 [t, vocabulary] are the student's, before each token; ``target`` int [t] is the token and ``row`` int [t]
    its row. ``teachers`` are by name, ``base`` or ``incumbent``, and undefined for rows that no objective compares.
    ``own`` is set if an objective needs it."""

    logits: Tensor
    target: Tensor
    row: Tensor
    teachers: Mapping[str, Teacher]
    own: OwnAnswers | None = None

    def zero(self) -> Tensor:
        return self.logits.new_zeros(())

    def teacher_distributions(self, teacher_of: Callable[[Part], str | None]) -> Teacher:
        names = [teacher_of(part) for part in self.part]
        teacher = self.teachers[names[0] or ""]
        for name in dict.fromkeys(names[1:]):
            own = torch.tensor([each == name for each in names], device=self.row.device)[self.row]
            other = self.teachers[name or ""]
            teacher = Teacher(
                torch.where(own[:, None], other.tokens, teacher.tokens),
                torch.where(own[:, None], other.logprobs, teacher.logprobs),
                torch.where(own, other.rest, teacher.rest),
            )
        return teacher

    def mean_over_rows(self, values: Tensor) -> Tensor:
        return mean_over_rows(values, self.row, len(self.part))

    def _select(self, rows: list[int]) -> Self:
        place = torch.full((len(self.part),), -1, device=self.row.device)
        place[torch.tensor(rows, device=place.device)] = torch.arange(len(rows), device=place.device)
        index = (place[self.row] >= 0).nonzero().flatten()
        own = self.own
        if own is not None:
            chosen = (place[own.row] >= 0).nonzero().flatten()
            own = OwnAnswers(own.logits[chosen], own.teacher[chosen], place[own.row[chosen]])
        return type(self)(
            part=tuple(self.part[row] for row in rows),
            logits=self.logits[index],
            target=self.target[index],
            row=place[self.row[index]],
            teachers={name: teacher[index] for name, teacher in self.teachers.items()},
            own=own,
        )


def mean_over_rows(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Mean over tokens of each row, then over rows: long answers count as much as short ones. ``values`` [t] are at the
    tokens of all rows, ``row`` int [t] is their row."""
    sums = values.new_zeros(rows).index_add(0, row, values)
    return (sums / torch.bincount(row, minlength=rows)).mean()


def summarise(logits: Tensor, k: int) -> Teacher:
    """The ``k`` most probable tokens of logits [t, vocabulary], and the rest as one."""
    logprobs = logits.float().log_softmax(dim=-1)
    top = logprobs.topk(min(k, logits.shape[-1]), dim=-1)
    return Teacher(top.indices, top.values, _others(logprobs, top.indices))


def divergence(teacher: Teacher, logits: Tensor) -> Tensor:
    """KL(teacher || student) at each token [t], from the student's logits [t, vocabulary]."""
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, teacher.tokens)
    known = (teacher.logprobs.exp() * (teacher.logprobs - chosen)).sum(dim=1)
    if teacher.tokens.shape[1] == logits.shape[1]:
        return known
    return known + teacher.rest.exp() * (teacher.rest - _others(logprobs, teacher.tokens))


def _others(logprobs: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of all other tokens together [t]; -inf if there are none."""
    if tokens.shape[1] == logprobs.shape[1]:
        return logprobs.new_full((len(logprobs),), -torch.inf)
    return logprobs.scatter(1, tokens, -torch.inf).logsumexp(dim=1)
