"""The loss of an update: its terms (:class:`Objective`), and those of the shipped recipes. Packages can add terms
(:mod:`updater.recipes.plugin_registry`)."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from core.errors import ConfigError
from updater.methods.batches import AnswerBatch, Batch, Features, divergence
from updater.recipes import Family, Part, Term
from updater.recipes.plugin_registry import Methods

log = logging.getLogger("ratchet.recipes")
B = TypeVar("B", bound=Batch)


class Objective(ABC, Generic[B]):
    """One term of the loss. Keyword arguments of ``__init__`` are the recipe's ``options``."""

    family: ClassVar[Family]
    teacher: str | None = None
    """Teacher to compare with: ``base``, ``incumbent`` (the adapter with which the update begins; the base without one)
    or ``momentum``. Its passes are charged."""
    momentum: tuple[float, float, float] = (0.9, 0.05, 0.05)
    """Shares of itself, the student and the start in a momentum teacher after a step."""
    frozen_texts: bool = False
    """True if only teachers' features of its further texts are needed, so that the student never runs them."""

    own_answers: bool = False
    """For VLMs: true if it needs the student's current answers, and their probabilities by a momentum model that has
    read the known answer. The passes are charged."""
    replay_teacher: str | None = None
    """Teacher of replayed rows, if it differs from ``teacher``."""

    def teacher_of(self, part: Part) -> str | None:
        return self.replay_teacher if part == "replay" and self.replay_teacher else self.teacher

    def teachers_of(self, part: Part) -> tuple[str, ...]:
        if self.replay_teacher is None:
            return self.teachers
        own = self.teacher_of(part)
        return (own,) if own else ()

    @property
    def teachers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name in (self.teacher, self.replay_teacher) if name))

    @abstractmethod
    def __call__(self, batch: B) -> Tensor:
        """Return the term's value: a scalar, a mean over rows so that it does not grow with the batch."""

    def begin(self, captions: Sequence[str], labels: Sequence[str]) -> None:
        """Called before the first step, after the state of an earlier update was loaded. Called twice: with the
        examples of the first batches, of which one is measured, and with all that steps visit. ``captions`` are those
        of all examples, ``labels`` the distinct labels in the order of ``Features.label``."""

    def further_texts(
        self, captions: Sequence[str], labels: Sequence[str], parts: Sequence[Part]
    ) -> list[tuple[int, str]]:
        """Texts needed in addition to the captions, each with the number of its example, -1 for a text in every batch.
        ``parts``: the pool of each example; other arguments as in :meth:`begin`."""
        return []

    def stepped(self, batch: B) -> None:
        """Called after the optimizer's step on ``batch``, without gradients."""

    def state(self) -> dict[str, Tensor]:
        """State for checkpoints and for the next update."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state` returned, in this update or in the one before."""


class ClipObjective(Objective[Features]):
    family: ClassVar[Family] = "clip"


class VlmObjective(Objective[AnswerBatch]):
    family: ClassVar[Family] = "vlm"


def known_teacher(name: str) -> str:
    """Raise TypeError, as for a wrong argument, unless it is the name of a fixed teacher."""
    if name not in ("base", "incumbent"):
        raise TypeError(f"teacher is {name!r}, not one of base, incumbent")
    return name


def positive(**options: float) -> None:
    """Raise TypeError, as for a wrong argument, for an option that is not above 0."""
    for name, value in options.items():
        if not value > 0:
            raise TypeError(f"{name} is {value}, and must be above 0")


class Contrastive(ClipObjective):
    """Cross entropy of each row and each column of the similarity matrix against its positives. Row i's target is
    uniform over the rows with the same caption (DreamLIP's multi-positive form): one-hot targets would make two
    pictures of "a red apple" push each other's caption away."""

    def __call__(self, batch: Features) -> Tensor:
        """Mean over both directions, in nats."""
        logits = batch.scale * batch.image @ batch.text.T
        target = batch.caption_targets
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


class FeatureDistillation(ClipObjective):
    """Mean squared distance on the unit sphere to the teacher's features, of images and texts, weighted by ``image``
    and ``text``. With only the image tower distilled, the texts could drift. ``replay``: teacher of replayed rows, if
    it is another one. Held to the base, they would be pulled back to their state before they were learned."""

    def __init__(self, image: float = 1.0, text: float = 1.0, teacher: str = "base", replay: str | None = None) -> None:
        self.image = image
        self.text = text
        self.teacher: str = known_teacher(teacher)
        self.replay_teacher = known_teacher(replay) if replay is not None else None

    def __call__(self, batch: Features) -> Tensor:
        """``|x - x0|^2`` averaged over rows and towers: 0 when nothing moved, 4 at the opposite pole."""
        teacher = batch.teacher_features(self.teacher_of)
        image = (batch.image - teacher.image).square().sum(dim=1).mean()
        text = (batch.text - teacher.text).square().sum(dim=1).mean()
        return (self.image * image + self.text * text) / 2


class ContrastiveDistillation(ClipObjective):
    """``L_img + L_txt`` of ZSCL (Zheng et al. 2023); over new rows with the incumbent as teacher, that of LwF.

    ``L_img = T^2 CE(softmax(z0 / T), softmax(z / T))`` with ``z = scale image @ text.T`` of the student and ``z0`` of
    the teacher, row by row; ``L_txt`` is the same of ``z.T``. Both factors of ``z`` are the student's: with the
    teacher's texts nothing would hold the text tower. ``temperature``: T; above 1, unlikely texts count more.
    ``captions``: number of distinct captions of the reference pool, evenly spread, that are added to the batch's own
    texts in ``L_img`` as the teacher sees them (ZSCL compares each image with the frozen texts of the whole reference).
    """

    def __init__(self, temperature: float = 2.0, teacher: str = "base", captions: int = 0) -> None:
        positive(temperature=temperature)
        if captions < 0:
            raise TypeError(f"captions is {captions}, and must be at least 0")
        self.temperature = temperature
        self.teacher: str = known_teacher(teacher)
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
        """Sum over both directions of the mean over rows, in nats. If nothing moved, it is T^2 times the teacher's
        entropy, with gradient 0."""
        teacher = batch.teachers[self.teacher]
        sharpness = batch.scale / self.temperature
        old = sharpness * teacher.image @ teacher.text.T
        new = sharpness * batch.image @ batch.text.T
        text = F.cross_entropy(new.T, old.T.softmax(dim=1))
        if self.captions and (further := batch.texts.get("contrastive_distillation")) is not None:
            frozen = further.teachers[self.teacher]
            old = torch.cat([old, sharpness * teacher.image @ frozen.T], dim=1)
            new = torch.cat([new, sharpness * batch.image @ frozen.T], dim=1)
        image = F.cross_entropy(new, old.softmax(dim=1))
        return self.temperature**2 * (image + text)


class AnswerLikelihood(VlmObjective):
    """Cross entropy of each answer token including the end; question and image are only read."""

    def __call__(self, batch: AnswerBatch) -> Tensor:
        """Mean over rows of the mean over a row's tokens, in nats."""
        return batch.mean_over_rows(F.cross_entropy(batch.logits, batch.target, reduction="none"))


class TokenDistillation(VlmObjective):
    """KL(teacher || student) over the next token, at each token of the known answer (Hinton et al. 2015, at T = 1). The
    teacher is kept as its most probable tokens and one bucket for all others, compared with the student's others: a
    lower bound of the whole KL, and equal to it if every token is kept. ``teacher``, ``replay``: as in
    :class:`FeatureDistillation`."""

    def __init__(self, teacher: str = "base", replay: str | None = None) -> None:
        self.teacher: str = known_teacher(teacher)
        self.replay_teacher = known_teacher(replay) if replay is not None else None

    def __call__(self, batch: AnswerBatch) -> Tensor:
        """Mean over rows of the mean over a row's tokens, in nats."""
        return batch.mean_over_rows(divergence(batch.teacher_distributions(self.teacher_of), batch.logits))


OBJECTIVES: Final[Methods[type[Objective[Any]]]] = Methods(
    "objectives",
    "objective",
    {
        "contrastive": Contrastive,
        "feature_distillation": FeatureDistillation,
        "contrastive_distillation": ContrastiveDistillation,
        "answer_likelihood": AnswerLikelihood,
        "token_distillation": TokenDistillation,
    },
    Objective,
)


def names(family: Family) -> list[str]:
    """Names of the objectives for a family's recipes, except those that cannot be imported."""
    found = []
    for name in OBJECTIVES.names():
        try:
            if OBJECTIVES.find(name).family == family:
                found.append(name)
        except ConfigError as error:  # only recipes that name it end with its error
            log.warning("%s", error)
    return found


def build(terms: Sequence[Term], family: Family) -> list[tuple[Term, Objective[Any]]]:
    """Create the objectives of a recipe. Raises ConfigError for a name or option that its family does not have."""
    built = []
    for term in terms:
        kind = OBJECTIVES.find(term.name)
        if kind.family != family:
            raise ConfigError(
                f"there is no objective {term.name!r} for a {family.upper()}.",
                f"Use one of {', '.join(names(family))}.",
            )
        with OBJECTIVES.options_of(term.name):
            built.append((term, kind(**term.options)))
    return built


def values(objectives: Sequence[tuple[Term, Objective[Any]]], batch: Batch) -> list[tuple[Term, Tensor]]:
    return [
        (term, objective(batch.select(rows)))
        for term, objective in objectives
        if term.weight > 0 and (rows := batch.rows(term.over))
    ]
